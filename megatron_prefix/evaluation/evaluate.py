"""Accuracy on a held-out set: greedy answers, from whoever samples them, scored against a column.

The prefix length has no say here: an answer may be ``eval.max_new_tokens`` long.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prefix.config import DataConfig, EvalConfig
from megatron_prefix.data.data_source import Row, open_source, require_columns
from megatron_prefix.data.prompts import PromptEncoder
from megatron_prefix.evaluation.pass_at_k import wilson_interval
from megatron_prefix.evaluation.scorers import Generated, Scorer, load_scorer
from megatron_prefix.rollout.protocol import NoRollouts
from megatron_prefix.types import FinishReason, Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Greedy rollouts of the prompts, one each and in their order, of at most so many tokens.
CollectFn = Callable[[Sequence[Prompt], int], Sequence[Rollout]]


@dataclass(frozen=True)
class EvalSet:
    """Problems to answer; ``answers[i]`` is that of ``prompts[i]``."""

    prompts: tuple[Prompt, ...]
    answers: tuple[str, ...]
    dropped: int  # prompts longer than data.max_prompt_length


@dataclass(frozen=True)
class EvalSample:
    """One answered problem."""

    row: int  # of the data set
    prompt: str  # as the model saw it
    generated: str  # special tokens left out
    answer: str
    correct: bool
    parsed: bool  # False: no answer could be read, from the text or from the column
    finish_reason: FinishReason
    tokens: int  # sampled
    sample: int = 0  # which of the answers to the problem, where it is asked several times


@dataclass(frozen=True)
class EvalResult:
    """``accuracy`` is the share of ``n`` answers that are right, with its 95% interval."""

    accuracy: float  # 0 to 1
    interval: tuple[float, float]  # Wilson's
    n: int
    truncated: int  # answers that met eval.max_new_tokens
    unparsable: int
    dropped: int  # prompts not asked, longer than data.max_prompt_length
    tokens: int  # sampled
    seconds: float  # of sampling and scoring
    samples: tuple[EvalSample, ...]
    lengths: tuple[tuple[int, int], ...]  # prompt and sampled tokens of each answer


def load_eval_set(
    config: EvalConfig, tokenizer: "PreTrainedTokenizerBase", data: DataConfig
) -> EvalSet:
    """The first ``eval.samples`` problems of the set, prompts written as ``data`` says.

    Chat template, system prompt and the rule for overlong prompts are the training's. Raises
    ValueError for a set that cannot be read, a missing column, or a row without an answer.
    """
    if config.samples < 0 or config.max_new_tokens < 1:
        raise ValueError(
            f"eval.samples={config.samples} must be 0 (all) or more, and "
            f"eval.max_new_tokens={config.max_new_tokens} at least 1"
        )
    source = _as_data(config, data)
    encoder = PromptEncoder(tokenizer, source, section="eval")
    prompts: list[Prompt] = []
    answers: list[str] = []
    dropped = 0
    rows = open_source(source, "eval").in_order()
    for number, row in islice(rows, config.samples or None):
        answer, ids = _answer(config, number, row), encoder.encode(number, row)
        if encoder.fits(number, ids):
            prompts.append(Prompt(index=len(prompts), row=number, input_ids=ids))
            answers.append(answer)
        else:
            dropped += 1
    if not prompts:
        raise ValueError(
            f"eval.path={config.path}: every prompt is longer than "
            f"data.max_prompt_length={data.max_prompt_length} tokens; raise it"
        )
    return EvalSet(tuple(prompts), tuple(answers), dropped)


def evaluate(
    config: EvalConfig,
    tokenizer: "PreTrainedTokenizerBase",
    collect_fn: CollectFn,
    data: DataConfig | None = None,
    scored: Callable[[], object] = lambda: None,
) -> EvalResult:
    """Asks for a greedy answer to each problem and scores it with ``eval.scorer``.

    ``data`` (default: ``DataConfig()``) says how prompts are written; ``scored`` is called after
    each score. Raises ValueError as
    :func:`load_eval_set` and :func:`~megatron_prefix.evaluation.scorers.load_scorer` do,
    NoRollouts where answers are missing.
    """
    scorer = load_scorer(config.scorer)
    problems = load_eval_set(config, tokenizer, data or DataConfig())
    start = time.monotonic()
    rollouts = collect_fn(problems.prompts, config.max_new_tokens)
    if len(rollouts) != len(problems.prompts):
        raise NoRollouts(
            f"{len(problems.prompts)} answers were asked for and {len(rollouts)} came; "
            "does another job abort requests on these servers?"
        )
    samples = []
    for asked in zip(problems.prompts, problems.answers, rollouts, strict=True):
        samples.append(score_answer(tokenizer, scorer, *asked))
        scored()
    correct = sum(sample.correct for sample in samples)
    return EvalResult(
        accuracy=correct / len(samples),
        interval=wilson_interval(correct, len(samples)),
        n=len(samples),
        truncated=sum(sample.finish_reason == "length" for sample in samples),
        unparsable=sum(not sample.parsed for sample in samples),
        dropped=problems.dropped,
        tokens=sum(sample.tokens for sample in samples),
        seconds=time.monotonic() - start,
        samples=tuple(samples),
        lengths=tuple((len(r.prompt_ids), len(r.prefix_ids)) for r in rollouts),
    )


def write_samples(path: str | Path, samples: Iterable[EvalSample]) -> None:
    """Writes one JSON object a sample and line, with the fields of :class:`EvalSample`; folders
    that are missing are made."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(asdict(sample), ensure_ascii=False) for sample in samples)
    Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def score_answer(
    tokenizer: "PreTrainedTokenizerBase",
    scorer: Scorer,
    prompt: Prompt,
    answer: str,
    rollout: Rollout,
    sample: int = 0,
) -> EvalSample:
    """What one rollout of a problem's prompt comes to."""
    assert rollout.prompt_index == prompt.index, "rollouts come in the prompts' order"
    text = _text(tokenizer, rollout.prefix_ids, skip_special_tokens=True)
    raw = _text(tokenizer, rollout.prefix_ids, skip_special_tokens=False)
    verdict = scorer(Generated(text, raw), answer)
    return EvalSample(
        row=prompt.row,
        prompt=_text(tokenizer, prompt.input_ids, skip_special_tokens=False),
        generated=text,
        answer=answer,
        correct=bool(verdict),
        parsed=verdict is not None,
        finish_reason=rollout.finish_reason,
        tokens=len(rollout.prefix_ids),
        sample=sample,
    )


def _as_data(config: EvalConfig, data: DataConfig) -> DataConfig:
    return replace(
        data,
        path=config.path,
        name=config.name or (data.name if config.path == data.path else ""),
        split=config.split,
        prompt_column=config.prompt_column,
        streaming=False,
        shuffle=False,
    )


def _answer(config: EvalConfig, number: int, row: Row) -> str:
    require_columns(row, {"answer_column": config.answer_column}, "eval", config.path)
    answer = row[config.answer_column]
    if not isinstance(answer, str | int | float) or not str(answer).strip():
        raise ValueError(
            f"eval.path={config.path}: row {number} has no answer in {config.answer_column} "
            f"({answer!r}); give it a text or a number"
        )
    return str(answer)


def _text(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], *, skip_special_tokens: bool
) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)  # one sequence was given, so it is no list
    return text
