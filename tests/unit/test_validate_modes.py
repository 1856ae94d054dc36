"""Modes and their data sets: what is refused before anything starts, each in one line."""

from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_prefix.config import DataConfig, ModelConfig, PrefixConfig, Recipe, TrainConfig
from megatron_prefix.preflight import check_data_sets, open_prompts
from megatron_prefix.recipe import load_recipe, save_record
from megatron_prefix.rollout.records import rollout_file
from megatron_prefix.tasks import sort_chain
from megatron_prefix.validate import validate
from megatron_prefix.validate.data import columns_of
from tests.refused import refusal_of


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    sort_chain.write_dataset(tmp_path / "prompts.jsonl", 3, 0)
    student, teacher = (
        ModelConfig(hf_path=str(sort_chain.model_folder(name)), params_dtype="fp32")
        for name in ("student_a", "teacher")
    )
    length = sort_chain.PROMPT_LENGTH
    return Recipe(
        student=student,
        teacher=teacher,
        data=DataConfig(path=str(tmp_path / "prompts.jsonl"), max_prompt_length=length),
        prefix=PrefixConfig("linear", 9, 75),
        train=TrainConfig(steps=10, global_batch_size=16, micro_batch_size=4),
    )


def changed(recipe: Recipe, folder: Path, *overrides: str) -> Recipe:
    return load_recipe(str(save_record(recipe, folder)), overrides=overrides)


def refusal(recipe: Recipe) -> str:
    return refusal_of(validate, recipe)


def test_written_answers_are_looked_at_before_anything_starts(
    recipe: Recipe, tmp_path: Path
) -> None:
    written = changed(recipe, tmp_path, "mode.name=off_policy")
    validate(written)
    check_data_sets(written)  # data.path's own answers
    with pytest.raises(ValueError, match="mode.written.answer_column=solution is not a column"):
        check_data_sets(changed(written, tmp_path, "mode.written.answer_column=solution"))
    apart = f"mode.written.path={recipe.data.path}"
    alone = changed(recipe, tmp_path, "mode.name=sft", apart, "data.path=")
    validate(alone)
    check_data_sets(alone)
    assert open_prompts(alone).num_rows == 3


def test_modes_that_cannot_be(recipe: Recipe, tmp_path: Path) -> None:
    def told(*overrides: str) -> str:
        return refusal(changed(recipe, tmp_path, *overrides))

    assert "Did you mean 'off_policy'?" in told("mode.name=offpolicy")
    apart = f"mode.written.path={recipe.data.path}"
    assert "is read by no step of mode.name=on_policy" in told(apart)
    missing = told("mode.name=sft", "mode.written.path=./nowhere.jsonl")
    assert "mode.written.path=./nowhere.jsonl does not exist" in missing
    unset = told("mode.name=sft", "data.path=")
    assert "mode.name=sft trains on written answers, and neither mode.written.path nor" in unset
    unset = told("mode.warmup_steps=10", "data.path=")
    assert "mode.warmup_steps=10 trains on written answers, and neither" in unset
    assert "data.path is not set" in told("mode.name=mixed", "data.path=", apart)
    assert "the student's folder will do" in told("mode.name=sft", "teacher.hf_path=")
    late = told("mode.warmup_steps=11")
    assert "mode.warmup_steps=11 is above train.steps=10" in late
    assert "mode.written_share=1.5 must be" in told("mode.name=mixed", "mode.written_share=1.5")


def test_parts_of_a_mode_that_nothing_comes_of(recipe: Recipe, tmp_path: Path) -> None:
    def told(*overrides: str) -> str:
        return refusal(changed(recipe, tmp_path, *overrides))

    unread = told("mode.written.answer_column=solution")
    assert "mode.written.answer_column=solution is read by no step of mode.name=on_policy" in unread
    homeless = told("mode.name=sft", "mode.written.split=test")
    assert "mode.written.path is empty; set that, or data.split for the rows" in homeless
    for policy in ("adaptive", "marginal"):
        still = told("mode.name=sft", f"prefix.policy={policy}")
        assert f"prefix.policy={policy} moves with the KL to a teacher, and no step" in still
        validate(changed(recipe, tmp_path, "mode.warmup_steps=9", f"prefix.policy={policy}"))
        told("mode.warmup_steps=10", f"prefix.policy={policy}")


@pytest.mark.parametrize(
    ("overrides", "setting"),
    [
        (["data.prompt_column=x"], "data.prompt_column=x"),
        (["mode.name=sft", "mode.written.answer_column=x"], "mode.written.answer_column=x"),
        (["mode.warmup_steps=1", "mode.written.path={there}"], "mode.written.answer_column=answer"),
        (["eval.path={there}"], "eval.answer_column=answer"),
        (["eval.path={there}", "eval.prompt_column=x"], "eval.prompt_column=x"),
        (["data.path={table}", "data.prompt_column=x"], "data.prompt_column=x"),
    ],
)
def test_plan_looks_at_the_columns_of_files_that_are_here(
    recipe: Recipe, tmp_path: Path, overrides: list[str], setting: str
) -> None:
    there, table = tmp_path / "there.jsonl", tmp_path / "table.parquet"
    there.write_text('\n{"prompt": "a1", "ids": [1]}\n')
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a1"]}), table)
    words = [override.format(there=there, table=table) for override in overrides]
    assert f"{setting} is not a column of" in refusal(changed(recipe, tmp_path, *words))
    kept = [word.replace("=x", "=prompt") for word in words if "there" not in word]
    validate(changed(recipe, tmp_path, *kept))


def test_what_a_look_cannot_tell_is_left_to_the_opening_of_the_set(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", "{"), ("b.jsonl", ""), ("c.jsonl", "[1]"), ("d.parquet", "?")):
        (tmp_path / name).write_text(text)
        assert columns_of(tmp_path / name) == ()
    assert columns_of(tmp_path / "none.jsonl") == columns_of(tmp_path) == ()


def test_a_teacher_that_follows_the_student_must_begin_as_the_student(
    recipe: Recipe, tmp_path: Path
) -> None:
    own = f"teacher.hf_path={recipe.student.hf_path}"
    follows = "mode.refresh_teacher_every=4"
    validate(changed(recipe, tmp_path, follows, own))
    assert "must begin as the same: set teacher.hf_path=" in refusal(
        changed(recipe, tmp_path, follows)
    )
    told = refusal(changed(recipe, tmp_path, follows, own, "teacher.params_dtype=bf16"))
    assert "needs teacher.params_dtype=fp32, the student's, not bf16" in told
    told = refusal(changed(recipe, tmp_path, follows, own, "mode.name=sft"))
    assert "no step of mode.name=sft asks a teacher" in told
    followed = changed(recipe, tmp_path, follows, own, "data.domain_column=domain")
    told = refusal(replace(followed, teachers={"maths": followed.teacher}))
    assert "copies into the one teacher; leave teachers out" in told


def test_a_replay_needs_no_written_answers(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    rollout_file(tmp_path / "rollouts", 0).touch()
    replayed = changed(
        recipe, tmp_path, "mode.name=sft", "data.path=", f"rollout.replay={tmp_path / 'rollouts'}"
    )
    validate(replayed)
    assert replace(replayed, data=recipe.data).mode.name == "sft"
