"""Rows name their teacher; microbatches hold the rollouts of one."""

from collections import Counter
from pathlib import Path

import pytest

from megatron_prefix.batch import plan_microbatches
from megatron_prefix.config import DataConfig, ModelConfig, Recipe
from megatron_prefix.data.domains import domain_readers
from megatron_prefix.placement import check_placement
from megatron_prefix.rollout.records import load_rollouts, save_rollouts
from megatron_prefix.types import Prompt, Rollout

PROMPT = Prompt(index=0, row=4, input_ids=(1, 2))


def a_recipe() -> Recipe:
    data = DataConfig(path="set.jsonl", domain_column="kind")
    return Recipe(data=data, teachers={"math": ModelConfig(), "code": ModelConfig()})


def rollout(domain: str, length: int) -> Rollout:
    return Rollout((5,) * 3, (6,) * length, (0.0,) * length, "length", 0, 0, domain=domain)


def test_a_row_names_its_teacher() -> None:
    (reader,) = domain_readers(a_recipe())
    for name, domain in (("math", "math"), ("code", "code"), ("teacher", "")):
        prompt = reader(4, {"kind": name}, PROMPT)
        assert prompt is not None and prompt.domain == domain
    assert domain_readers(Recipe()) == ()


@pytest.mark.parametrize("name", ["art", "", None])
def test_a_teacher_that_is_not_there_is_named_with_the_row(name: str | None) -> None:
    (reader,) = domain_readers(a_recipe())
    wanted = rf"row 4 of set.jsonl wants the teacher {name!r}; there are teacher, code, math"
    with pytest.raises(ValueError, match=wanted):
        reader(4, {"kind": name}, PROMPT)
    with pytest.raises(ValueError, match="data.domain_column=kind is not a column of set.jsonl"):
        reader(4, {"prompt": "x"}, PROMPT)


@pytest.mark.parametrize(("column", "teachers"), [("kind", {}), ("", {"math": ModelConfig()})])
def test_the_column_and_the_teachers_go_together(
    column: str, teachers: dict[str, ModelConfig]
) -> None:
    recipe = Recipe(data=DataConfig(domain_column=column), teachers=teachers)
    with pytest.raises(ValueError, match="data.domain_column=.*give both or neither"):
        check_placement(recipe)


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_microbatch_holds_the_rollouts_of_one_teacher(replicas: int) -> None:
    sizes = {"": 5, "code": 1, "math": 10}
    rollouts = [rollout(domain, 1 + i) for domain, size in sizes.items() for i in range(size)]
    plan = plan_microbatches(rollouts, 4, replicas=replicas)
    assert len(plan) % replicas == 0
    assert sorted(index for chosen in plan.members for index in chosen) == list(range(16))
    for microbatch, chosen in enumerate(plan.members):
        assert len(chosen) <= 4
        assert {rollouts[index].domain for index in chosen} <= {plan.domain(microbatch)}
    assert Counter(plan.domains).keys() == sizes.keys()
    one = plan_microbatches([rollout("", 4)] * 8, 4, replicas=replicas)
    assert one.domains == () and len(one) == 4


def test_domains_are_recorded(tmp_path: Path) -> None:
    rollouts = [rollout("math", 2), rollout("", 3), rollout("code", 1)]
    save_rollouts(tmp_path, 0, rollouts)
    assert load_rollouts(tmp_path, 0) == rollouts
