"""The prompt stream: shuffled, resumable, epoch after epoch, tokenised as it is read.

The order is a function of ``data.seed`` and the epoch alone, so a position (epoch, records read)
is all that a checkpoint needs. Prompts longer than ``data.max_prompt_length`` are never cut.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from megatron_prefix.config import DataConfig
from megatron_prefix.data.data_source import Row, open_source, require_columns
from megatron_prefix.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
# Adds to a prompt what else its row (number, columns) holds; None drops the row.
RowReader = Callable[[int, Row, Prompt], Prompt | None]


@dataclass(frozen=True)
class PromptEncoder:
    """Turns a row's prompt column, a text or a list of chat messages, into token ids.

    Raises ValueError where ``data.chat_template`` asks for what the tokenizer lacks.
    """

    tokenizer: "PreTrainedTokenizerBase"
    data: DataConfig
    section: str = "data"  # of the recipe, for errors

    def __post_init__(self) -> None:
        if self.data.overlong not in ("drop", "error"):
            raise ValueError(f"data.overlong={self.data.overlong} must be drop or error")
        choice = self.data.chat_template
        if choice not in ("auto", "always", "never"):
            raise ValueError(f"data.chat_template={choice} must be auto, always or never")
        if choice == "always" and not self.tokenizer.chat_template:
            raise ValueError(
                "data.chat_template=always but the tokenizer has none; "
                "set data.chat_template=never or add one to its folder"
            )
        if self.data.system_prompt and not self.uses_template:
            raise ValueError(
                "data.system_prompt is set but no chat template is used; empty it or use one"
            )

    @property
    def uses_template(self) -> bool:
        return self.data.chat_template != "never" and bool(self.tokenizer.chat_template)

    def encode(self, number: int, row: Row) -> tuple[int, ...]:
        """Token ids [P] of row ``number``, for the model to continue. Never cut.

        Raises ValueError for a missing column and a prompt that is neither a text nor messages.
        """
        columns = {"prompt_column": self.data.prompt_column}
        require_columns(row, columns, self.section, self.data.path)
        prompt = row[self.data.prompt_column]
        if isinstance(prompt, str) and not self.uses_template:
            ids = self.tokenizer(prompt, verbose=False)["input_ids"]
        elif isinstance(prompt, str):
            ids = self._render([{"role": "user", "content": prompt}], number)
        elif _is_chat(prompt):
            ids = self._render(prompt, number)
        else:
            raise self._error(
                number,
                f"is {_shown(prompt)}, not a text or a list of {{role, content}} messages",
            )
        if not ids:
            raise self._error(number, "has no tokens; remove the row or give it a text")
        return tuple(ids)

    def fits(self, number: int, ids: tuple[int, ...]) -> bool:
        """Whether a prompt is short enough; where ``data.overlong=error``, ValueError if not."""
        limit = self.data.max_prompt_length
        if len(ids) > limit and self.data.overlong == "error":
            raise ValueError(
                f"{self.section}.path={self.data.path}: row {number} has {len(ids)} prompt tokens, "
                f"more than data.max_prompt_length={limit}; raise it or set data.overlong=drop"
            )
        return len(ids) <= limit

    def _render(self, messages: list[dict[str, str]], number: int) -> list[int]:
        from jinja2 import TemplateError

        if not self.uses_template:
            raise self._error(number, "holds chat messages but no chat template is used; add one")
        if self.data.system_prompt and messages[0]["role"] != "system":
            messages = [
                {"role": "system", "content": self.data.system_prompt},
                *messages,
            ]
        try:
            ids = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )
        except TemplateError as error:
            raise self._error(number, f"is refused by the chat template: {error}") from error
        return cast(list[int], ids)

    def _error(self, number: int, what: str) -> ValueError:
        where = f"{self.section}.path={self.data.path}: row {number}"
        return ValueError(f"{where}: {self.data.prompt_column} {what}")


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class PromptStream:
    """An endless stream of prompts over ``data.path``, reshuffled each epoch.

    Raises ValueError at once for a data set that cannot be read, and for one whose first usable
    prompt does not exist: a bad column, a row without a text, or every prompt overlong.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        readers: Sequence[RowReader] = (),
        section: str = "data",
    ) -> None:
        self._data, self._section, self._readers = data, section, tuple(readers)
        self._encoder = PromptEncoder(tokenizer, data, section)
        self._source = open_source(data, section)
        self._rank, self._world = 0, 1
        self._epoch = self._consumed = self._next_index = self._dropped = 0
        self._reader: Iterator[tuple[int, Row]] | None = None
        self._require_one_usable()

    @property
    def num_rows(self) -> int:
        """Rows of the data set; 0 where it is streamed."""
        return self._source.num_rows

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def dropped(self) -> int:
        """Overlong prompts dropped in the first pass so far: each row counts once."""
        return self._dropped

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts; of a shard, its share of the next n * world."""
        prompts = [self._next_prompt() for _ in range(n * self._world)]
        return prompts[self._rank :: self._world]

    def shard(self, rank: int, world: int) -> "PromptStream":
        """A view from here on that takes every ``world``-th prompt, beginning with ``rank``.

        ``take(n)`` on all shards gives together what ``take(n * world)`` gives on the whole, and
        leaves each with the same state, so that a resumed run may have another ``world``.
        """
        if not 0 <= rank < world:
            raise ValueError(f"shard rank {rank} must be at least 0 and less than world {world}")
        view = PromptStream.__new__(PromptStream)
        view.__dict__.update(self.__dict__, _rank=rank, _world=world, _reader=None)
        return view

    def state_dict(self) -> dict[str, int]:
        """The position, and what it means anything for: the seed and the data set's size."""
        return {
            "epoch": self._epoch,
            "consumed": self._consumed,
            "next_index": self._next_index,
            "dropped": self._dropped,
            **self._identity(),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues exactly where a state was taken.

        Raises ValueError where the seed, the shuffling or the number of rows is another.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"the saved prompt position has {name}={state[name]} but data.{name} is now "
                    f"{value}; resume with the saved value or start a run of another name"
                )
        self._epoch, self._consumed = state["epoch"], state["consumed"]
        self._next_index, self._dropped = state["next_index"], state["dropped"]
        self._reader = None

    def _identity(self) -> dict[str, int]:
        shuffle, rows = int(self._data.shuffle), self._source.num_rows
        return {"seed": self._data.seed, "shuffle": shuffle, "num_rows": rows}

    def _next_prompt(self) -> Prompt:
        while True:
            number, row = self._next_record()
            prompt = self._read(number, row)
            if prompt is not None:
                self._next_index += 1
                return prompt
            self._dropped += self._epoch == 0

    def _read(self, number: int, row: Row) -> Prompt | None:
        """The row as the stream's next prompt; None where it is too long."""
        ids = self._encoder.encode(number, row)
        prompt: Prompt | None = None
        if self._encoder.fits(number, ids):
            prompt = Prompt(index=self._next_index, row=number, input_ids=ids)
        for reader in self._readers:
            prompt = prompt and reader(number, row, prompt)
        return prompt

    def _next_record(self) -> tuple[int, Row]:
        if self._reader is None:
            self._reader = self._source.read(self._epoch, self._consumed)
        record = next(self._reader, None)
        if record is None:
            self._begin_next_pass()
            return self._next_record()
        self._consumed += 1
        return record

    def _begin_next_pass(self) -> None:
        if self._epoch == 0 and self._dropped and self._rank == 0:
            logger.warning(
                "%s: dropped %d of %d prompts, longer than data.max_prompt_length=%d tokens",
                self._data.path,
                self._dropped,
                self._consumed,
                self._data.max_prompt_length,
            )
        self._epoch, self._consumed, self._reader = self._epoch + 1, 0, None

    def _require_one_usable(self) -> None:
        if not all(self._read(number, row) is None for number, row in self._source.in_order()):
            return
        encoder, limit = self._encoder, self._data.max_prompt_length
        rows = self._source.in_order()
        if any(encoder.fits(number, encoder.encode(number, row)) for number, row in rows):
            why = "every prompt of the teacher's is too long; raise mode.teacher_prompt.max_length"
        else:
            why = f"every prompt is longer than data.max_prompt_length={limit} tokens; raise it"
        raise ValueError(f"{self._section}.path={self._data.path}: {why}")
