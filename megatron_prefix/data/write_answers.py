"""Teacher-written answers to a recipe's prompts: sampled by SGLang, kept as they come.

While it is under way OUTPUT.partial has the answers in the order of their arrival, and
OUTPUT.settings.json what was asked of whom; the same settings go on where they stopped. OUTPUT
itself is there once it is whole, in the order of the data set.
"""

import asyncio
import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from megatron_prefix.config import Recipe
from megatron_prefix.data.data_source import Row, open_source
from megatron_prefix.data.prompts import PromptEncoder
from megatron_prefix.data.tokenizers import load_tokenizer, stop_token_ids
from megatron_prefix.rollout.async_client import AsyncGenerator
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.protocol import Generation, Sampling, SglangError
from megatron_prefix.run_files.jsonl import JsonLines, read_records
from megatron_prefix.run_files.whole_file import whole_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IN_FLIGHT = 128  # requests that a server holds at a time


@dataclass(frozen=True)
class Writing:
    """What is to be written."""

    recipe: Recipe
    output: Path
    rows: int  # the first of the data set; 0: all
    answers_per_prompt: int
    max_new_tokens: int
    temperature: float

    def check(self) -> None:
        """ValueError for what cannot be asked, and for an output that is there already."""
        counts = {"--rows": self.rows + 1, "--answers": self.answers_per_prompt}
        for name, value in {**counts, "--max-new-tokens": self.max_new_tokens}.items():
            if value < 1:
                raise ValueError(f"{name} {value - (name == '--rows')} is too small")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature} must be 0 (greedy) or above")
        if self.temperature == 0.0 and self.answers_per_prompt > 1:
            raise ValueError(
                f"--answers {self.answers_per_prompt} greedy answers are one answer; add "
                "--temperature 1"
            )
        if self.output.exists():
            raise ValueError(f"--output {self.output} is there already; remove it or name another")

    def settings(self) -> dict[str, Any]:
        """What must be the same for answers to belong into one file."""
        return {
            "teacher": self.recipe.teacher.hf_path,
            "data": asdict(self.recipe.data),
            "rows": self.rows,
            "answers_per_prompt": self.answers_per_prompt,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
        }

    @property
    def partial(self) -> Path:
        return self.output.with_name(f"{self.output.name}.partial")


@dataclass(frozen=True)
class Written:
    """What was done."""

    answers: int
    empty: int  # came back without a token, and are not in the file
    cut: int  # met the length limit
    dropped: int  # prompts longer than data.max_prompt_length, not asked
    tokens: int


@dataclass(frozen=True)
class _Question:
    row: int
    sample: int
    prompt: Any  # the prompt column's value
    input_ids: tuple[int, ...]


class AnswersMissing(SglangError):
    """Some requests were aborted; the others' answers are kept."""


def check_settings(writing: Writing) -> None:
    """Writes the settings beside the output, or finds them there; ValueError where they differ."""
    path = writing.output.with_name(f"{writing.output.name}.settings.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = json.loads(json.dumps(writing.settings()))
    if not writing.partial.exists():
        path.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        return
    theirs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{writing.partial} was begun with {key}={theirs.get(key)!r}, now it is "
                f"{ours.get(key)!r}; name another --output, or remove that file"
            )


def write_answers(
    writing: Writing,
    serve: Callable[[], contextlib.AbstractContextManager[Sequence[Endpoint]]],
    console: Console,
) -> Written:
    """Asks the servers of ``serve()`` for what is missing, and puts the whole file in its place.

    Raises AnswersMissing where requests were aborted, and what the client raises; what came is
    kept then.
    """
    check_settings(writing)
    tokenizer = load_tokenizer(writing.recipe.teacher.hf_path)
    questions, dropped = _questions(writing, tokenizer)
    kept = _kept(writing.partial)
    missing = [each for each in questions if (each.row, each.sample) not in kept]
    console.print(f"{len(questions) - len(missing)} of {len(questions)} answers are there")
    if missing:
        with serve() as endpoints:
            asyncio.run(_ask_all(writing, tokenizer, missing, endpoints, console))
    return _finish(writing, dropped)


def _questions(
    writing: Writing, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[_Question], int]:
    """What to ask, and how many prompts are too long for it."""
    data = writing.recipe.data
    encoder, questions, dropped = PromptEncoder(tokenizer, data), [], 0
    rows: Iterator[tuple[int, Row]] = open_source(data).in_order()
    for number, row in islice(rows, writing.rows or None):
        ids = encoder.encode(number, row)
        if not encoder.fits(number, ids):
            dropped += 1
            continue
        questions += [
            _Question(number, sample, row[data.prompt_column], ids)
            for sample in range(writing.answers_per_prompt)
        ]
    if not questions:
        raise ValueError(
            f"data.path={data.path}: every prompt is longer than data.max_prompt_length="
            f"{data.max_prompt_length} tokens; raise it"
        )
    return questions, dropped


def _kept(path: Path) -> set[tuple[int, int]]:
    """Answers of an earlier start; a line that it left half written is taken out."""
    if path.exists():
        text = path.read_bytes()
        os.truncate(path, text.rfind(b"\n") + 1)
    return {(record["row"], record["sample"]) for record in read_records(path)}


async def _ask_all(
    writing: Writing,
    tokenizer: "PreTrainedTokenizerBase",
    missing: Sequence[_Question],
    endpoints: Sequence[Endpoint],
    console: Console,
) -> None:
    stops = stop_token_ids(writing.recipe.teacher.hf_path)
    sampling = Sampling(writing.max_new_tokens, writing.temperature, stops)
    servers = [AsyncGenerator(endpoint) for endpoint in endpoints]
    waiting = iter(missing)  # shared: a server takes the next question when it has room
    file, aborted = JsonLines(writing.partial), 0

    async def work(server: AsyncGenerator, advance: Callable[[], None]) -> None:
        nonlocal aborted
        for question in waiting:
            (generation,) = await server.generate([question.input_ids], sampling)
            if generation.finish_reason == "abort":
                aborted += 1
                continue
            file.write(_record(question, generation, tokenizer))
            advance()

    try:
        with _bar(console, len(missing)) as advance:
            async with asyncio.TaskGroup() as group:
                for server in servers:
                    for _ in range(IN_FLIGHT):
                        group.create_task(work(server, advance))
    except* SglangError as errors:
        raise errors.exceptions[0] from None
    finally:
        file.close()
        for server in servers:
            await server.close()
    if aborted:
        raise AnswersMissing(
            f"{aborted} of {len(missing)} requests were aborted; the same command asks them again"
        )


def _record(
    question: _Question, generation: Generation, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    return {
        "row": question.row,
        "sample": question.sample,
        "prompt": question.prompt,
        "answer": tokenizer.decode(generation.token_ids, skip_special_tokens=True),
        "answer_ids": list(generation.token_ids),
        "finish_reason": generation.finish_reason,
    }


@contextlib.contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal; anywhere else ten lines in all."""
    if console.is_terminal:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("write", total=total)
            yield lambda: progress.advance(task)
        return
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if 10 * done // total > 10 * (done - 1) // total:
            console.print(f"{done} of {total} answered", highlight=False)

    yield advance


def _finish(writing: Writing, dropped: int) -> Written:
    """Puts the whole file in its place, sorted, so that arrival leaves no trace in it."""
    records = sorted(read_records(writing.partial), key=lambda each: (each["row"], each["sample"]))
    whole = [record for record in records if record["answer_ids"]]
    if not whole:
        raise ValueError(f"all {len(records)} answers are empty; does the teacher end at once?")
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in whole)
    with whole_file(writing.output) as file:
        file.write_text("".join(lines), encoding="utf-8")
    writing.partial.unlink()
    return Written(
        answers=len(whole),
        empty=len(records) - len(whole),
        cut=sum(record["finish_reason"] == "length" for record in whole),
        dropped=dropped,
        tokens=sum(len(record["answer_ids"]) for record in whole),
    )
