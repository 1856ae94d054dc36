"""Who ends a turn with what: agreement, disagreement in one line, an explicit mapping."""

import json
from pathlib import Path

import pytest

from megatron_prefix.config import DataConfig, ModelConfig, Recipe, RolloutConfig, StopTokensConfig
from megatron_prefix.data.stop_tokens import (
    agreed_stop_ids,
    check_stop_tokens,
    stop_tokens,
    template_stop_ids,
)
from megatron_prefix.data.tokenizers import load_tokenizer, write_byte_tokenizer
from tests.refused import refusal_of

PAD, BOS, END, SPARE = 256, 257, 261, 262  # of the byte tokenizer; its template writes <end>


def folder(path: Path, generation: object = END, config: object = None) -> str:
    write_byte_tokenizer(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    if config is not None:
        (path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    return str(path)


def recipe(
    student: str,
    teacher: str,
    *,
    template: str = "auto",
    urls: tuple[str, ...] = (),
    **stops: object,
) -> Recipe:
    return Recipe(
        student=ModelConfig(hf_path=student),
        teacher=ModelConfig(hf_path=teacher),
        data=DataConfig(chat_template=template),
        rollout=RolloutConfig(server_urls=urls),
        stop_tokens=StopTokensConfig(**stops),
    )


def refusal(ours: Recipe) -> str:
    return refusal_of(check_stop_tokens, ours)


def test_all_parties_that_agree_are_told_apart(tmp_path: Path) -> None:
    ours = recipe(folder(tmp_path / "s", [END], END), folder(tmp_path / "t"))
    found = check_stop_tokens(ours)
    assert found.agreed == found.student == found.teacher == found.template == found.server
    assert agreed_stop_ids(ours) == (END,)


def test_another_teacher_is_named_with_ids_and_tokens_of_all(tmp_path: Path) -> None:
    told = refusal(recipe(folder(tmp_path / "s"), folder(tmp_path / "t", [END, PAD])))
    assert f"the teacher ends turns with [{PAD}, {END}]" in told
    assert f"student {END} '<end>'; teacher {PAD} '<pad>', {END} '<end>'" in told
    assert f"chat template {END} '<end>'; server {END} '<end>'" in told
    assert "stop_tokens.ids" in told


def test_a_template_that_ends_otherwise_is_refused_and_unused_it_does_not_matter(
    tmp_path: Path,
) -> None:
    student, teacher = folder(tmp_path / "s", SPARE), folder(tmp_path / "t", SPARE)
    told = refusal(recipe(student, teacher))
    assert f"the student's chat template ends a turn with [{END}]" in told
    assert check_stop_tokens(recipe(student, teacher, template="never")).template == ()


def test_where_the_server_ends_besides_is_refused(tmp_path: Path) -> None:
    """SGLang joins config.json's ids to those of generation_config.json."""
    student = folder(tmp_path / "s", END, [END, PAD])
    told = refusal(recipe(student, folder(tmp_path / "t")))
    assert f"SGLang also ends at [{PAD}] of the student's folder" in told
    both = recipe(student, folder(tmp_path / "t"), ids=(END, PAD))
    assert check_stop_tokens(both).agreed == (PAD, END)


def test_a_running_server_has_a_tokenizer_whose_eos_counts(tmp_path: Path) -> None:
    paths = folder(tmp_path / "s", SPARE), folder(tmp_path / "t", SPARE)
    started = recipe(*paths, template="never")
    running = recipe(*paths, template="never", urls=("http://host:1",))
    assert stop_tokens(started).server == (SPARE,)
    assert f"SGLang also ends at [{END}]" in refusal(running)


def test_an_explicit_mapping_puts_the_teachers_token_in_place(tmp_path: Path) -> None:
    paths = folder(tmp_path / "s"), folder(tmp_path / "t", PAD)
    assert f"the teacher ends turns with [{PAD}]" in refusal(recipe(*paths))
    assert "the teacher ends turns with none of" in refusal(recipe(*paths, ids=(END,)))
    mapped = check_stop_tokens(recipe(*paths, ids=(END,), teacher_ids=(PAD,)))
    assert mapped.teacher == (END,)


@pytest.mark.parametrize(
    ("stops", "words"),
    [
        ({"ids": (END,), "teacher_ids": (PAD, BOS)}, "must have one id for each of"),
        ({"ids": (END, END)}, "must be different ids, each named once"),
        ({"ids": (END, PAD), "teacher_ids": (PAD, BOS)}, "must be different ids"),
        ({"ids": (END, 9999)}, "stop_tokens.ids: 9999 is no id; the last is 263"),
    ],
)
def test_a_mapping_that_cannot_be_is_refused(tmp_path: Path, stops: dict, words: str) -> None:
    assert words in refusal(recipe(folder(tmp_path / "s"), folder(tmp_path / "t"), **stops))


def test_a_template_that_takes_no_answers_says_nothing(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder(tmp_path / "s"))
    assert template_stop_ids(tokenizer) == (END,)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ raise_exception('no') }}"
    assert template_stop_ids(tokenizer) == ()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert template_stop_ids(tokenizer) == ()
