"""The teacher's own prompt for each row of the data set, where it reads another than the student.

Only what stands before the prefix differs: the teacher's distribution at prefix position n, after
its own prompt and the prefix so far, is compared with the student's there (arXiv 2603.05433 has the
teacher read "be concise"; a worked solution in the prompt is privileged context).
"""

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_prefix.config import DataConfig, Recipe
from megatron_prefix.data.data_source import Row, require_columns
from megatron_prefix.data.prompts import PromptEncoder, RowReader
from megatron_prefix.data.tokenizers import load_tokenizer
from megatron_prefix.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECTION = "mode.teacher_prompt"  # that errors name
_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class TeacherPromptReader:
    """Adds the teacher's prompt to a row's prompt; drops rows for which it is too long."""

    encoder: PromptEncoder
    template: str

    def __call__(self, number: int, row: Row, prompt: Prompt) -> Prompt | None:
        """ValueError for a template that names a column that the row lacks."""
        ids = self.encoder.encode(number, self._rewritten(row))
        return replace(prompt, teacher_ids=ids) if self.encoder.fits(number, ids) else None

    def _rewritten(self, row: Row) -> Row:
        data = self.encoder.data
        require_columns(row, {"prompt_column": data.prompt_column}, "data", data.path)
        prompt = row[data.prompt_column]
        if not self.template or not prompt:
            return row
        if isinstance(prompt, str):
            written: Any = self._filled(row, prompt)
        else:
            *before, last = prompt
            written = [*before, {**last, "content": self._filled(row, last["content"])}]
        return {**row, data.prompt_column: written}

    def _filled(self, row: Row, prompt: str) -> str:
        values = {**row, "prompt": prompt}

        def value(found: re.Match[str]) -> str:
            name = found[1]
            if name not in values:
                raise ValueError(
                    f"{SECTION}.template names {{{name}}}, no column of {self.encoder.data.path}; "
                    f"it has {', '.join(values)}"
                )
            return str(values[name])

        return _FIELD.sub(value, self.template)


def teacher_readers(
    recipe: Recipe, data: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[RowReader, ...]:
    """The reader of the teacher's prompts for ``data``; none where it reads the student's.

    ``tokenizer`` is the student's. Raises ValueError where a system prompt has no template to be
    put into.
    """
    settings = recipe.mode.teacher_prompt
    if not reads_another_prompt(recipe):
        return ()
    if settings.chat_template_of == "teacher":
        tokenizer = load_tokenizer(recipe.teacher.hf_path)
    theirs = replace(
        data,
        system_prompt=settings.system_prompt or data.system_prompt,
        max_prompt_length=settings.max_length or data.max_prompt_length,
    )
    templated = data.chat_template != "never" and tokenizer.chat_template
    if settings.system_prompt and not templated:
        raise ValueError(
            f"{SECTION}.system_prompt is set but no chat template is used; write it into "
            f"{SECTION}.template, as in 'Be concise. {{prompt}}'"
        )
    return (TeacherPromptReader(PromptEncoder(tokenizer, theirs), settings.template),)


def reads_another_prompt(recipe: Recipe) -> bool:
    """Whether the teacher's prompts are encoded apart from the student's."""
    settings = recipe.mode.teacher_prompt
    another = bool(settings.template or settings.system_prompt)
    return another or settings.chat_template_of == "teacher"
