"""The stop-token contract: all who read or write a turn's end must mean the same token by it.

A student that is taught by a teacher with another stop token never learns to stop, or to stop at
the wrong place, and no loss shows it. So before a run its student, teacher, chat template and
servers are asked which ids end a turn.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prefix.config import Recipe
from megatron_prefix.data.tokenizers import load_tokenizer, stop_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "MARK"  # an assistant's answer, to be found again in what a template makes of it


@dataclass(frozen=True)
class StopTokens:
    """The ids that end a turn, ascending, as each party has them."""

    agreed: tuple[int, ...]  # the recipe's, or else the student folder's
    student: tuple[int, ...]
    teacher: tuple[int, ...]  # after the recipe's mapping
    template: tuple[int, ...]  # what follows an answer; () where no template is used
    server: tuple[int, ...]  # where SGLang ends a rollout, told so or not


def agreed_stop_ids(recipe: Recipe) -> tuple[int, ...]:
    """The ids at which the run's rollouts end. ValueError where neither recipe nor folder says."""
    return tuple(sorted(set(recipe.stop_tokens.ids))) or stop_token_ids(recipe.student.hf_path)


def stop_tokens(recipe: Recipe) -> StopTokens:
    """What all parties say; ValueError for folders that say nothing and a broken mapping."""
    mapping = teacher_mapping(recipe)
    student = stop_token_ids(recipe.student.hf_path)
    teacher = {mapping.get(each, each) for each in stop_token_ids(recipe.teacher.hf_path)}
    agreed = agreed_stop_ids(recipe)
    tokenizer = load_tokenizer(recipe.student.hf_path)
    templated = recipe.data.chat_template != "never" and bool(tokenizer.chat_template)
    return StopTokens(
        agreed=agreed,
        student=student,
        teacher=tuple(sorted(teacher)),
        template=template_stop_ids(tokenizer) if templated else (),
        server=tuple(sorted({*agreed, *served_stop_ids(recipe)})),
    )


def teacher_mapping(recipe: Recipe) -> dict[int, int]:
    """The student's stop id for each of the teacher's that the recipe names."""
    ids, theirs = recipe.stop_tokens.ids, recipe.stop_tokens.teacher_ids
    if theirs and len(theirs) != len(ids):
        raise ValueError(
            f"stop_tokens.teacher_ids={list(theirs)} must have one id for each of "
            f"stop_tokens.ids={list(ids)}"
        )
    if len({*ids, *theirs}) != len(ids) + len(theirs) and theirs != ids:
        raise ValueError(
            f"stop_tokens.ids={list(ids)} and stop_tokens.teacher_ids={list(theirs)} must be "
            "different ids, each named once"
        )
    return {} if theirs == ids else dict(zip(theirs, ids, strict=bool(theirs)))


def served_stop_ids(recipe: Recipe) -> set[int]:
    """Where SGLang ends a rollout by itself: at ``eos_token_id`` of config.json *and* of
    generation_config.json, and, for servers that have one, the tokenizer's eos."""
    folder = Path(recipe.student.hf_path)
    found: set[object] = set()
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        value = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        found |= set(value) if isinstance(value, list) else {value}
    if recipe.rollout.server_urls:  # those that we start have no tokenizer
        found.add(load_tokenizer(recipe.student.hf_path).eos_token_id)
    return {each for each in found if isinstance(each, int)}


def template_stop_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """The token that the chat template writes behind an assistant's answer; () for a template
    that writes nothing there or takes no such message."""
    from jinja2 import TemplateError

    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError:
        return ()
    assert isinstance(text, str)
    rest = text.rpartition(_MARK)[2]
    ids = tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"]
    return (int(ids[0]),) if rest.strip() and ids else ()


def check_stop_tokens(recipe: Recipe) -> StopTokens:
    """What was agreed on; ValueError, with the ids and tokens of each, where a party differs."""
    found = stop_tokens(recipe)
    tokenizer = load_tokenizer(recipe.student.hf_path)
    size = len(tokenizer)
    for key, ids in (("ids", found.agreed), ("teacher_ids", recipe.stop_tokens.teacher_ids)):
        for each in ids:
            if not 0 <= each < size:
                raise ValueError(f"stop_tokens.{key}: {each} is no id; the last is {size - 1}")
    told = "; ".join(
        f"{name} {_named(ids, tokenizer)}"
        for name, ids in {
            "student": found.student,
            "teacher": found.teacher,
            "chat template": found.template,
            "server": found.server,
        }.items()
        if ids
    )
    for problem in _problems(found, explicit=bool(recipe.stop_tokens.ids)):
        raise ValueError(
            f"stop tokens disagree: {problem}. {told}. Mend eos_token_id in the folders, or say "
            "what holds with stop_tokens.ids (and stop_tokens.teacher_ids)"
        )
    return found


def _problems(found: StopTokens, *, explicit: bool) -> Iterable[str]:
    agreed = set(found.agreed)
    if set(found.server) - agreed:
        yield f"SGLang also ends at {sorted(set(found.server) - agreed)} of the student's folder"
    if set(found.template) - agreed:
        yield f"the student's chat template ends a turn with {list(found.template)}"
    if explicit and not set(found.teacher) & agreed:
        yield f"the teacher ends turns with none of {sorted(agreed)}"
    if not explicit and set(found.teacher) != agreed:
        yield f"the teacher ends turns with {list(found.teacher)}"


def _named(ids: Iterable[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    names: Mapping[int, str] = {place: token for token, place in tokenizer.get_vocab().items()}
    return ", ".join(f"{each} {names.get(each, 'no token')!r}" for each in ids)
