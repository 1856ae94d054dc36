"""Written prefixes: prompts with answers that are there before the run, as rollouts of a step.

Legend: A tokens of a whole answer, L the prefix length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from megatron_prefix.config import DataConfig, Recipe
from megatron_prefix.data.data_source import Row, open_source, require_columns
from megatron_prefix.data.domains import domain_readers
from megatron_prefix.data.prompts import PromptStream
from megatron_prefix.data.teacher_prompts import teacher_readers
from megatron_prefix.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECTION = "mode.written"  # that errors name


@dataclass(frozen=True)
class AnswerReader:
    """Reads a row's answer: a text, which the stop token then ends, or token ids.

    What follows an answer's first stop token is left out: no model would have sampled it.
    """

    tokenizer: "PreTrainedTokenizerBase"
    stop_token_ids: tuple[int, ...]
    column: str
    path: str

    def __call__(self, number: int, row: Row, prompt: Prompt) -> Prompt:
        """The prompt with its answer [A]; ValueError as :meth:`check`."""
        self.check(number, row)
        answer = row[self.column]
        ids = self._of_text(answer) if isinstance(answer, str) else tuple(answer)
        return replace(prompt, answer_ids=self._until_stop(ids))

    def check(self, number: int, row: Row) -> None:
        """ValueError where the row has no answer that could be trained on; tokenises nothing."""
        require_columns(row, {"answer_column": self.column}, SECTION, self.path)
        answer = row[self.column]
        if isinstance(answer, str):
            return
        if not _is_ids(answer):
            raise self._error(number, f"is {_shown(answer)}, neither a text nor token ids")
        if not answer:
            raise self._error(number, "has no token; remove the row or give it an answer")
        size = len(self.tokenizer)
        outside = [each for each in answer if not 0 <= each < size]
        if outside:
            raise self._error(number, f"has id {outside[0]}, and the tokenizer ends at {size - 1}")

    def _of_text(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        own = self.tokenizer.eos_token_id
        stop = own if own in self.stop_token_ids else self.stop_token_ids[0]
        return (*ids, stop)

    def _until_stop(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        ends = (at for at, each in enumerate(ids) if each in self.stop_token_ids)
        return ids[: next(ends, len(ids)) + 1]

    def _error(self, number: int, what: str) -> ValueError:
        where = f"{SECTION}.answer_column={self.column}: row {number} of {self.path}"
        return ValueError(f"{where} {what}")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def written_data(recipe: Recipe) -> DataConfig:
    """Where the written answers' prompts are; template, limits and order are the ``data``'s."""
    written = recipe.mode.written
    if not written.path:
        return recipe.data
    return replace(
        recipe.data,
        path=written.path,
        name=written.name,
        split=written.split,
        prompt_column=written.prompt_column,
    )


def _section(recipe: Recipe) -> str:
    return SECTION if recipe.mode.written.path else "data"


class WrittenSource:
    """Written answers as rollouts, in the seeded order of their data set; asks no server."""

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: "PreTrainedTokenizerBase",
        stop_token_ids: Sequence[int],
    ) -> None:
        data, stops = written_data(recipe), tuple(stop_token_ids)
        self._stop_token_ids = frozenset(stops)
        reader = AnswerReader(tokenizer, stops, recipe.mode.written.answer_column, data.path)
        if recipe.mode.name == "mixed" and not recipe.mode.written.path:
            # The rows that are sampled come in the seed's own order.
            data = replace(data, seed=data.seed + 1)
        self._prompts = PromptStream(
            data,
            tokenizer,
            readers=(reader, *teacher_readers(recipe, data, tokenizer), *domain_readers(recipe)),
            section=_section(recipe),
        )

    def take(self, count: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        """The next ``count`` answers, cut at ``prefix_length`` as a server would cut them."""
        prompts = self._prompts.take(count)
        return [self._rollout(each, prefix_length, policy_version) for each in prompts]

    def _rollout(self, prompt: Prompt, prefix_length: int, policy_version: int) -> Rollout:
        ids = prompt.answer_ids[:prefix_length]
        return Rollout(
            prompt_ids=prompt.input_ids,
            prefix_ids=ids,
            rollout_logprobs=(math.nan,) * len(ids),
            finish_reason="stop" if ids[-1] in self._stop_token_ids else "length",
            policy_version=policy_version,
            prompt_index=prompt.index,
            domain=prompt.domain,
            written=True,
            teacher_prompt_ids=prompt.teacher_ids,
        )

    def state_dict(self) -> dict[str, Any]:
        return self._prompts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._prompts.load_state_dict(state)


def check_written(
    recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", stop_token_ids: Sequence[int]
) -> None:
    """Looks at every answer of a set on this machine, and at the first of a streamed one.

    ValueError names the first row that could not be trained on: a run must not meet it later.
    """
    data = written_data(recipe)
    column = recipe.mode.written.answer_column
    reader = AnswerReader(tokenizer, tuple(stop_token_ids), column, data.path)
    rows = open_source(data, _section(recipe)).in_order()
    for number, row in islice(rows, 1) if data.streaming else rows:
        reader.check(number, row)
    WrittenSource(recipe, tokenizer, stop_token_ids)
