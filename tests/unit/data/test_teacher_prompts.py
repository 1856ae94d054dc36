"""Prompts that the teacher reads instead of the student's: templates, refusals, packing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_prefix.batch import as_teacher_reads, pack, plan_microbatches
from megatron_prefix.config import DataConfig, ModeConfig, ModelConfig, Recipe, TeacherPromptConfig
from megatron_prefix.data.prompts import PromptStream
from megatron_prefix.data.teacher_prompts import teacher_readers
from megatron_prefix.data.tokenizers import load_tokenizer, write_byte_tokenizer
from megatron_prefix.types import Prompt, Rollout

ROW = {"prompt": "2+2?", "prompt_de": "Was ist 2+2?", "solution": "It is 4."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(folder)
    return folder


def prompts(
    folder: Path, tmp_path: Path, *rows: dict, chat: str = "never", **settings: str | int
) -> list[Prompt]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        teacher=ModelConfig(hf_path=str(folder)),
        data=DataConfig(
            path=str(path), chat_template=chat, system_prompt="S" if chat == "always" else ""
        ),
        mode=ModeConfig(teacher_prompt=TeacherPromptConfig(**settings)),
    )
    tokenizer = load_tokenizer(str(folder))
    readers = teacher_readers(recipe, recipe.data, tokenizer)
    return PromptStream(recipe.data, tokenizer, readers=readers).take(len(rows))


def text(folder: Path, ids: tuple[int, ...]) -> str:
    return str(load_tokenizer(str(folder)).decode(ids))


def test_without_settings_the_teacher_reads_what_the_student_reads(
    folder: Path, tmp_path: Path
) -> None:
    (prompt,) = prompts(folder, tmp_path, ROW)
    assert prompt.teacher_ids == ()


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("Be concise. {prompt}", "Be concise. 2+2?"),
        ("{prompt_de}", "Was ist 2+2?"),
        ("{prompt} Known: {solution} {prompt}", "2+2? Known: It is 4. 2+2?"),
        ("set {1, 2}: {prompt}", "set {1, 2}: 2+2?"),
    ],
)
def test_a_template_takes_the_prompts_place(
    folder: Path, tmp_path: Path, template: str, expected: str
) -> None:
    (prompt,) = prompts(folder, tmp_path, ROW, template=template)
    assert text(folder, prompt.input_ids) == "2+2?"
    assert text(folder, prompt.teacher_ids) == expected


def test_with_a_chat_template_the_last_message_and_the_system_prompt_are_the_teachers(
    folder: Path, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "2+2?"}]
    (prompt,) = prompts(
        folder, tmp_path, {"prompt": chat}, chat="always", template="[{prompt}]", system_prompt="T"
    )
    ours, theirs = (text(folder, ids) for ids in (prompt.input_ids, prompt.teacher_ids))
    assert ours == "<system>S<end><user>Hi<end><user>2+2?<end><assistant>"
    assert theirs == "<system>T<end><user>Hi<end><user>[2+2?]<end><assistant>"


def test_a_column_that_is_not_there_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"template names \{answer\}, no column of .*solution"):
        prompts(folder, tmp_path, ROW, template="{answer}")


def test_a_system_prompt_without_a_chat_template_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mode.teacher_prompt.system_prompt is set but no chat"):
        prompts(folder, tmp_path, ROW, system_prompt="Be concise.")


def test_rows_whose_teacher_prompt_is_too_long_are_dropped(folder: Path, tmp_path: Path) -> None:
    long = {**ROW, "prompt": "7+7?", "solution": "x" * 50}
    template = "{prompt} {solution}"
    taken = prompts(folder, tmp_path, ROW, long, ROW, template=template, max_length=20)
    assert {text(folder, each.input_ids) for each in taken} == {"2+2?"}
    with pytest.raises(ValueError, match="of the teacher's is too long; raise mode.teacher_pro"):
        prompts(folder, tmp_path, long, template=template, max_length=20)


def test_the_teachers_microbatches_have_the_students_positions_and_their_own_length() -> None:
    ours = [
        Rollout((1,) * 3, (7, 8, 9), (0.0,) * 3, "length", 0, 0, teacher_prompt_ids=(2,) * 9),
        Rollout((1,) * 5, (6,), (0.0,), "length", 0, 1),
    ]
    plan = plan_microbatches(ours, 1, multiple=4)
    theirs, their_plan = as_teacher_reads(ours, plan)
    assert (plan.tokens, their_plan.tokens, their_plan.members) == (12, 16, plan.members)
    cpu = torch.device("cpu")
    student, teacher = pack(ours, plan, 0, cpu), pack(theirs, their_plan, 0, cpu)
    assert torch.equal(student.labels, teacher.labels)
    assert torch.equal(student.prefix_offsets, teacher.prefix_offsets)
    assert student.prefix_positions.tolist() == [2, 3, 4, 9]
    assert teacher.prefix_positions.tolist() == [8, 9, 10, 15]
    assert teacher.input_ids.tolist() == [2] * 9 + [7, 8] + [1] * 5
    alike = [replace(each, teacher_prompt_ids=()) for each in ours]
    assert as_teacher_reads(alike, plan) == (alike, plan)
