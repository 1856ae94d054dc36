"""``megatron-prefix eval``: asks servers for answers, keeps every one as it comes, sums them up.

An output folder holds ``settings.json`` (what was asked of whom), ``samples.jsonl`` (one answer a
line, in the order of arrival) and ``summary.json``. The same settings go on where they stopped.
"""

import asyncio
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_prefix.evaluation.evaluate import EvalSample, EvalSet, score_answer
from megatron_prefix.evaluation.pass_at_k import Estimate, average, passed, powers_of_two
from megatron_prefix.evaluation.scorers import Scorer
from megatron_prefix.rollout.async_client import AsyncGenerator
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.protocol import Sampling, SglangError
from megatron_prefix.run_files.jsonl import JsonLines, number, read_records
from megatron_prefix.run_files.whole_file import whole_file
from megatron_prefix.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS, SAMPLES, SUMMARY = "settings.json", "samples.jsonl", "summary.json"
# Requests that a server holds at a time. More would only wait in its queue, where their time-out
# runs already.
IN_FLIGHT = 128
_LINES = 10  # of progress where there is no terminal


@dataclass(frozen=True)
class Questions:
    """What is to be answered, and by what it is judged."""

    problems: EvalSet
    samples_per_prompt: int
    sampling: Sampling
    tokenizer: "PreTrainedTokenizerBase"
    scorer: Scorer


@dataclass(frozen=True)
class EvalSummary:
    """P problems with n answers each. Rates and estimates are from 0 to 1."""

    problems: int
    samples_per_prompt: int
    avg_at_n: Estimate
    pass_at: Mapping[int, Estimate]  # by k
    truncated: int  # answers that met the length limit
    unparsable: int  # no answer could be read, from the text or from the column: wrong
    dropped: int  # prompts not asked: too long
    tokens: int  # sampled

    @property
    def answers(self) -> int:
        return self.problems * self.samples_per_prompt


class AnswersMissing(SglangError):
    """Some requests were aborted; the others' answers are kept."""


def check_settings_file(folder: Path, settings: Mapping[str, Any]) -> None:
    """Writes ``settings`` into ``folder``, or finds them there.

    ValueError names the first that differs: answers to other questions must not be mixed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    ours = json.loads(json.dumps(settings))
    if not path.exists():
        with whole_file(path) as file:
            file.write_text(json.dumps(ours, indent=2) + "\n", encoding="utf-8")
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{folder} holds another evaluation: {key} is {theirs.get(key)!r} there and "
                f"{ours.get(key)!r} here; give this one another --output, or remove that folder"
            )


def kept_samples(folder: Path) -> list[EvalSample]:
    """Answers of an earlier start; a line that it left half written is taken out of the file."""
    path = folder / SAMPLES
    samples = [EvalSample(**record) for record in read_records(path)]
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        lines = (json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
        with whole_file(path) as file:
            file.write_text("".join(lines), encoding="utf-8")
    return samples


def ask(
    questions: Questions, endpoints: Sequence[Endpoint], folder: Path, console: Console
) -> list[EvalSample]:
    """Every answer, those of earlier starts included; new ones are in the folder as they come.

    Raises AnswersMissing where requests were aborted, and what the client raises.
    """
    kept = kept_samples(folder)
    answered = {(sample.row, sample.sample) for sample in kept}
    missing = [
        (prompt, answer, n)
        for prompt, answer in zip(
            questions.problems.prompts, questions.problems.answers, strict=True
        )
        for n in range(questions.samples_per_prompt)
        if (prompt.row, n) not in answered
    ]
    if missing:
        kept += asyncio.run(_ask_all(questions, missing, endpoints, folder, console, len(kept)))
    return kept


_Question = tuple[Prompt, str, int]


async def _ask_all(
    questions: Questions,
    missing: Sequence[_Question],
    endpoints: Sequence[Endpoint],
    folder: Path,
    console: Console,
    done: int,
) -> list[EvalSample]:
    servers = [AsyncGenerator(endpoint) for endpoint in endpoints]
    waiting = iter(missing)  # shared: a server takes the next question when it has room
    answers: list[EvalSample] = []
    view = _View(console, done, done + len(missing))
    file = JsonLines(folder / SAMPLES)

    async def work(server: AsyncGenerator) -> None:
        for question in waiting:
            sample = await _ask_one(questions, question, server)
            if sample is not None:
                file.write(asdict(sample))
                answers.append(sample)
                view.show(answers)

    try:
        async with asyncio.TaskGroup() as group:
            for server in servers:
                for _ in range(IN_FLIGHT):
                    group.create_task(work(server))
    except* SglangError as errors:
        raise errors.exceptions[0] from None
    finally:
        view.close()
        file.close()
        for server in servers:
            await server.close()
    if len(answers) < len(missing):
        raise AnswersMissing(
            f"{len(missing) - len(answers)} of {len(missing)} requests were aborted; does another "
            "job abort requests on these servers? The same command asks them again"
        )
    return answers


async def _ask_one(
    questions: Questions, question: _Question, server: AsyncGenerator
) -> EvalSample | None:
    """The scored answer; None where the request was aborted."""
    prompt, answer, n = question
    (generation,) = await server.generate([prompt.input_ids], questions.sampling)
    if generation.finish_reason == "abort":
        return None
    rollout = Rollout(
        prompt_ids=prompt.input_ids,
        prefix_ids=generation.token_ids,
        rollout_logprobs=generation.logprobs,
        finish_reason=generation.finish_reason,
        policy_version=generation.policy_version,
        prompt_index=prompt.index,
    )
    return score_answer(questions.tokenizer, questions.scorer, prompt, answer, rollout, n)


class _View:
    """A bar on a terminal; anywhere else ten lines in all."""

    def __init__(self, console: Console, done: int, total: int) -> None:
        self._console, self._first, self._total = console, done, total
        self._lines = self._said(done)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[right]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self._task = self._bar.add_task("eval", total=total, completed=done, right="")
            self._bar.start()

    def _said(self, done: int) -> int:
        return _LINES * done // self._total

    def show(self, answers: Sequence[EvalSample]) -> None:
        done = self._first + len(answers)
        if self._bar is not None:
            right = sum(sample.correct for sample in answers) / len(answers)
            self._bar.update(self._task, completed=done, right=f"{right:.1%} right")
        elif self._said(done) > self._lines:
            self._lines = self._said(done)
            self._console.print(f"{done} of {self._total} answered", highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def summarise(problems: EvalSet, n: int, samples: Iterable[EvalSample]) -> EvalSummary:
    """What all n answers to each problem come to."""
    by_row: dict[int, list[EvalSample]] = {prompt.row: [] for prompt in problems.prompts}
    for sample in samples:
        by_row[sample.row].append(sample)
    assert all(len(answers) == n for answers in by_row.values()), "an answer is missing"
    right = [sum(sample.correct for sample in answers) for answers in by_row.values()]
    flat = [sample for answers in by_row.values() for sample in answers]
    return EvalSummary(
        problems=len(by_row),
        samples_per_prompt=n,
        avg_at_n=average(right, n),
        pass_at={k: passed(right, n, k) for k in powers_of_two(n)},
        truncated=sum(sample.finish_reason == "length" for sample in flat),
        unparsable=sum(not sample.parsed for sample in flat),
        dropped=problems.dropped,
        tokens=sum(sample.tokens for sample in flat),
    )


def summary_record(summary: EvalSummary, settings: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's form of a summary, with what was evaluated. ``accuracy`` is avg@n."""
    return {
        "model": settings["model"],
        "data": settings["eval"]["path"],
        "problems": summary.problems,
        "samples_per_prompt": summary.samples_per_prompt,
        "temperature": settings["temperature"],
        "accuracy": number(summary.avg_at_n.value),
        "interval": list(summary.avg_at_n.interval),
        "pass_at": {
            str(k): {"value": number(each.value), "interval": list(each.interval)}
            for k, each in summary.pass_at.items()
        },
        "truncated": summary.truncated,
        "truncation_rate": summary.truncated / summary.answers,
        "unparsable": summary.unparsable,
        "dropped": summary.dropped,
        "tokens": summary.tokens,
        "mean_tokens": summary.tokens / summary.answers,
    }


def summary_lines(summary: EvalSummary) -> Iterator[tuple[str, str]]:
    """Names and values for a person."""
    n = summary.samples_per_prompt
    yield "problems", f"{summary.problems}"
    if n == 1:
        yield "accuracy", _shown(summary.avg_at_n)
    else:
        yield f"avg@{n}", _shown(summary.avg_at_n)
        for k, estimate in summary.pass_at.items():
            if k > 1:  # pass@1 is avg@n
                yield f"pass@{k}", _shown(estimate)
    share = summary.truncated / summary.answers
    yield "truncated", f"{summary.truncated} of {summary.answers} answers ({share:.1%})"
    yield "unparsable, counted as wrong", str(summary.unparsable)
    if summary.dropped:
        yield "prompts too long to ask", str(summary.dropped)
    yield "tokens an answer", f"{summary.tokens / summary.answers:.1f}"


def _shown(estimate: Estimate) -> str:
    low, high = estimate.interval
    return f"{estimate.value:.1%} (95%: {low:.1%} to {high:.1%})"


def write_summary(folder: Path, record: Mapping[str, Any], started: float) -> dict[str, Any]:
    """Writes and returns ``record`` with the seconds since ``started`` (monotonic)."""
    whole = {**record, "seconds": time.monotonic() - started}
    with whole_file(folder / SUMMARY) as file:
        file.write_text(json.dumps(whole, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return whole
