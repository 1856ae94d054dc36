"""Run folders as a trainer writes them, for the tests of what reads them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from megatron_prefix.config import LogConfig, ModelConfig, PrefixConfig, Recipe, TrainConfig
from megatron_prefix.evaluation.evaluate import EvalSample, write_samples
from megatron_prefix.recipe import save_record
from megatron_prefix.run_files.jsonl import EVALUATION_FOLDER
from megatron_prefix.run_files.log import RunLog
from megatron_prefix.types import Flops, ProbeMetrics, StepMetrics


@dataclass(frozen=True)
class Answers:
    accuracy: float
    n: int = 40
    truncated: int = 0
    unparsable: int = 2
    tokens: int = 300
    seconds: float = 1.0


def metrics(step: int, prefix_length: int, kl: float) -> StepMetrics:
    tokens = np.full(prefix_length, 8)
    kl_by_position = np.full(prefix_length, kl)
    tokens[-1], kl_by_position[-1] = 0, np.nan  # no rollout reached the last position
    return StepMetrics(
        step=step,
        loss=kl,
        kl_by_position=kl_by_position,
        tokens_by_position=tokens,
        grad_norm=1.0,
        lr=1e-3,
        skipped=False,
        prefix_length=prefix_length,
        prefix_tokens=int(tokens.sum()),
        prompt_tokens=112,
        cut_fraction=0.0,
        policy_version=step - 1,
        policy_lag=0.0,
        logprob_diff_max=0.0,
        logprob_diff_mean=0.0,
        flops=Flops(1e9, 2e9, 3e9),
        flops_full=Flops(2e9, 4e9, 6e9),
        seconds={"rollout": 0.5, "student": 0.25},
    )


def write_run(folder: Path, evaluated: dict[int, float], steps: int = 6) -> Path:
    """A run's JSON lines: ``steps`` steps, and the accuracy after those in ``evaluated``."""
    console = Console(quiet=True)
    with RunLog(folder, LogConfig(tensorboard=False), steps, console=console) as log:
        for step in range(steps + 1):
            if step:
                log.step(metrics(step, 2 + step, 1.0 / step))
            if step in evaluated:
                log.evaluation(step, Answers(evaluated[step]), Flops(rollout=5e9))
    return folder


def write_whole_run(folder: Path, *, steps: int = 12, total: int = 12, words: str = "") -> Path:
    """A run with everything that a run can have; ``words`` are put into every text of it."""
    model = ModelConfig(hf_path=f"models/{words or 'small'}")
    recipe = Recipe(
        student=model, train=TrainConfig(steps=total), prefix=PrefixConfig("linear", 2, 20)
    )
    save_record(recipe, folder)
    log = LogConfig(tensorboard=False, probe_interval=4)
    with RunLog(folder, log, total, console=Console(quiet=True)) as run:
        for step in range(steps + 1):
            if step:
                run.step(metrics(step, 2 + step, 2.0 / step))
            if step % 4 == 0:
                run.probe(probe(step))
                run.evaluation(step, Answers(step / (steps + 1)), Flops(rollout=5e9))
                write_samples(
                    folder / EVALUATION_FOLDER / f"step_{step:08d}.jsonl", answers(step, words)
                )
        run.rollouts(4, [f"2+2{words}"], [f"4{words}"], [{"finish_reason": "stop", "tokens": 1}])
        run.event("skipped", f"step 3 had loss nan{words}")
        run.event("resume", "resumed after step 2")
    return folder


def probe(step: int, length: int = 20) -> ProbeMetrics:
    kl = 1.0 / (1.0 + np.arange(length)) + 0.01 * step
    tokens = np.full(length, 8)
    return ProbeMetrics(
        step=step,
        prefix_length=2 + step,
        kl_prefix=float(kl[: 2 + step].mean()),
        kl_tail=float(kl[2 + step :].mean()),
        kl_by_position=kl,
        tokens_by_position=tokens,
        finished=0,
        rollouts=8,
        flops=Flops(1e9, 2e9, 1e9),
        agreement=0.9 - 0.05 * step,
    )


def answers(step: int, words: str) -> list[EvalSample]:
    return [
        EvalSample(row, f"what is {row}?{words}", f"it is {row}{words}", str(row),
                   bool(step and row % 2), row != 3, "stop" if row else "length", 12)
        for row in range(10)
    ]  # fmt: skip
