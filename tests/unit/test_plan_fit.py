"""What does not fit is refused, with the smallest change that does."""

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megatron_prefix.cli import BAD_INPUT, DONE, main
from megatron_prefix.config import Recipe, RolloutConfig
from megatron_prefix.jobs.cluster import Cluster
from megatron_prefix.plan import (
    Change,
    ModelSizes,
    make_plan,
    measure_fit,
    plan_recipe,
    refuse_what_does_not_fit,
)
from megatron_prefix.plan.fit import GIB, Fit, refusal, single_changes
from megatron_prefix.recipe import load_recipe
from megatron_prefix.validate import validate

BIG = "qwen3_32b_to_qwen3_8b_8xh100_bf16"


def big(*settings: str) -> Recipe:
    return load_recipe(BIG, "", list(settings))


def quick(recipe: Recipe) -> Fit:
    fit = plan_recipe(recipe, Cluster(), quick=True).fit
    assert fit is not None
    return fit


def needs(recipe: Recipe, changes: Sequence[Change]) -> int:
    recipe = Change("run.world_size", 8).of(recipe)
    for change in changes:
        recipe = change.of(recipe)
    run = validate(recipe, ModelSizes(), sizes_only=True)
    return max(rank.total for rank in make_plan(run).ranks)


def test_a_card_is_shared_with_the_server_and_the_reserve() -> None:
    fit = quick(big("run.gpu_memory_gib=100", "run.gpu_reserve_gib=5"))
    assert (fit.card, fit.server, fit.reserve) == (100 * GIB, 40 * GIB, 5 * GIB)
    assert fit.free == 55 * GIB and fit.fits and not fit.changes


def test_servers_elsewhere_take_nothing() -> None:
    recipe = big("run.gpu_memory_gib=60")
    ranks = make_plan(validate(recipe, ModelSizes(), sizes_only=True)).ranks
    beside = measure_fit(recipe, ranks, servers_elsewhere=True)
    assert beside and beside.server == 0 and beside.fits
    away = replace(recipe, rollout=RolloutConfig(server_urls=("http://host:30000",)))
    assert measure_fit(away, ranks) == beside


def test_without_a_card_nothing_is_checked() -> None:
    assert plan_recipe(big("run.gpu_memory_gib=0"), Cluster(), quick=True).fit is None


def test_a_server_on_the_cards_needs_a_share() -> None:
    with pytest.raises(ValueError, match="has no --mem-fraction-static"):
        quick(replace(big(), rollout=RolloutConfig()))
    many = RolloutConfig(server_args=("--mem-fraction-static=much",))
    with pytest.raises(ValueError, match="much is no number"):
        quick(replace(big(), rollout=many))


def test_a_teacher_in_host_memory_is_the_smallest_change_where_that_makes_room() -> None:
    recipe = big("run.gpu_memory_gib=64")
    fit = quick(recipe)
    assert list(map(str, fit.changes)) == ["teacher.offload=true"]
    assert fit.needs_then == needs(recipe, fit.changes) <= fit.free < fit.needs


def test_a_change_of_one_of_several_teachers_is_that_ones() -> None:
    recipe = big()
    recipe = replace(recipe, teachers={"math": recipe.teacher, "code": recipe.teacher})
    changed = Change("teachers.math.offload", True).of(recipe)
    offloaded = {name: teacher.offload for name, teacher in changed.teachers.items()}
    assert offloaded == {"math": True, "code": False} and not changed.teacher.offload


def test_the_change_named_is_the_first_that_fits() -> None:
    recipe = big("run.gpu_memory_gib=54", "teacher.offload=true")
    fit = quick(recipe)
    assert not fit.fits and len(fit.changes) == 1
    assert fit.needs_then == needs(recipe, fit.changes) <= fit.free
    run = validate(recipe, ModelSizes(), sizes_only=True)
    order = single_changes(run)
    before = order[: order.index(fit.changes[0])]
    assert before
    for change in before:
        try:
            assert needs(recipe, [change]) > fit.free
        except ValueError:  # no layout at all
            continue


def test_two_settings_where_no_single_one_does() -> None:
    recipe = big("run.gpu_memory_gib=80", "run.gpu_reserve_gib=22")
    fit = quick(recipe)
    assert len(fit.changes) == 2
    assert fit.needs_then == needs(recipe, fit.changes) <= fit.free
    assert all(needs(recipe, [change]) > fit.free for change in fit.changes)


def test_what_can_never_fit_says_so() -> None:
    fit = quick(big("run.gpu_memory_gib=12"))
    assert not fit.changes
    assert "give more cards" in refusal(fit)


def test_the_command_refuses_in_one_line_after_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", BIG, "--quick", "run.gpu_memory_gib=64"]) == BAD_INPUT
    shown = capsys.readouterr()
    assert "Does not fit" in shown.out
    assert shown.err.count("\n") == 1
    assert "does not fit: rank 0 needs" in shown.err and "the smallest change" in shown.err


def test_servers_that_train_would_miss_are_missed_here_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = ["eval.path=no/such.jsonl", "eval.interval=1", "eval.own_servers=9"]
    assert main(["plan", BIG, "--quick", *own]) == BAD_INPUT
    assert "eval.own_servers=9 of " in capsys.readouterr().err


def test_a_run_is_refused_by_the_limit_that_is_known() -> None:
    recipe = big("run.gpu_memory_gib=64")
    with pytest.raises(ValueError, match="smallest change .* teacher.offload=true .*check_memory"):
        refuse_what_does_not_fit(recipe)
    refuse_what_does_not_fit(big("run.gpu_memory_gib=64", "run.check_memory=false"))
    refuse_what_does_not_fit(recipe, servers_elsewhere=True)
    refuse_what_does_not_fit(big("run.gpu_memory_gib=0"))
    with pytest.raises(ValueError, match="of the card's 64.0 are free .*SGLang's"):
        refuse_what_does_not_fit(big("run.gpu_memory_gib=0"), card_gib=64)
    with pytest.raises(ValueError, match="of the card's 64.0 are free"):
        refuse_what_does_not_fit(big(), card_gib=64)
    with pytest.raises(ValueError, match="of the card's 64.0 are free"):
        refuse_what_does_not_fit(recipe, card_gib=80)


def test_a_server_whose_share_nobody_knows_refuses_nothing() -> None:
    unknown = replace(big("run.gpu_memory_gib=0"), rollout=RolloutConfig())
    refuse_what_does_not_fit(unknown, card_gib=64)
    with pytest.raises(ValueError, match="does not fit"):
        refuse_what_does_not_fit(unknown, card_gib=40)
    with pytest.raises(ValueError, match="has no --mem-fraction-static"):
        refuse_what_does_not_fit(replace(big(), rollout=RolloutConfig()))


def test_json_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", BIG, "--quick", "--json"]) == DONE
    told = json.loads(capsys.readouterr().out)
    assert told["fit"]["fits"] and told["fit"]["needs"] == told["ranks"][0]["total"]
    assert told["shapes"] and not told["built"]


def test_a_change_reads_as_a_setting() -> None:
    assert str(Change("student.sequence_parallel", True)) == "student.sequence_parallel=true"
    assert str(Change("train.micro_batch_size", 4)) == "train.micro_batch_size=4"
