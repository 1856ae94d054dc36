"""What a run folder holds, read back: a run's history by step, and its summary.

Legend: S steps taken, L prefix positions.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.run_files import jsonl
from megatron_prefix.run_files.kl_grid import mean_kl

FLOPS_PARTS = ("rollout", "teacher", "student")
_REALS = ("accuracy", "seconds", "flops")  # of an evaluation; null in JSON is NaN


@dataclass(frozen=True)
class EvaluationRecord:
    step: int  # the weights after this step; 0: before training
    accuracy: float  # 0 to 1
    n: int
    truncated: int
    tokens: int
    seconds: float
    unparsable: int = 0
    prompt_tokens: int = 0
    flops: float = float("nan")  # NaN: a run of an earlier version, which did not count them


@dataclass(frozen=True)
class RunHistory:
    """A run's steps in order, one entry a step, and its evaluations, one a step evaluated."""

    step: np.ndarray  # int64 [S]
    kl: np.ndarray  # float64 [S], token-weighted mean over positions, NaN without a token
    kl_by_position: tuple[np.ndarray, ...]  # S of float32 [L_s]
    prefix_length: np.ndarray  # int64 [S]
    prefix_tokens: np.ndarray  # int64 [S]
    flops: np.ndarray  # float64 [S, 3], by FLOPS_PARTS
    flops_full: np.ndarray  # float64 [S], the full-length counterfactual's sum
    seconds: Mapping[str, np.ndarray]  # by phase, float64 [S]
    skipped: np.ndarray  # bool [S], no update was made
    evaluations: tuple[EvaluationRecord, ...]


@dataclass(frozen=True)
class RunSummary:
    """What is left of a run when one line must do. FLOPs leave evaluations out."""

    steps: int
    accuracy_before: float  # 0 to 1; NaN where the recipe evaluates nothing
    accuracy_after: float
    eval_prompts: int
    tokens_sampled: int  # prefix tokens trained on
    flops: float
    flops_full_opd: float  # what the same steps would have cost at the full length
    seconds: float

    @property
    def flops_ratio(self) -> float:
        return self.flops / self.flops_full_opd if self.flops_full_opd else float("nan")


def load_run(folder: Path) -> RunHistory:
    """Reads ``metrics.jsonl`` and ``evaluations.jsonl`` of a run folder.

    Raises ValueError where the folder holds no step.
    """
    rows = [_columns_of(record) for record in jsonl.read_records(folder / jsonl.METRICS)]
    if not rows:
        raise ValueError(f"{folder} holds no step in {jsonl.METRICS}: name the folder of a run")
    phases = dict.fromkeys(phase for row in rows for phase in row["seconds"])
    return RunHistory(
        step=np.array([row["step"] for row in rows]),
        kl=np.array([row["kl"] for row in rows]),
        kl_by_position=tuple(row["kl_by_position"] for row in rows),
        prefix_length=np.array([row["prefix_length"] for row in rows]),
        prefix_tokens=np.array([row["prefix_tokens"] for row in rows]),
        flops=np.array([row["flops"] for row in rows]),
        flops_full=np.array([row["flops_full"] for row in rows]),
        seconds={
            phase: np.array([row["seconds"].get(phase) or 0.0 for row in rows]) for phase in phases
        },
        skipped=np.array([row["skipped"] for row in rows]),
        evaluations=_load_evaluations(folder / jsonl.EVALUATIONS),
    )


def _columns_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """One line without what no report needs; arrays compact, so that long runs fit in memory."""
    kl_L = np.array(record["kl_by_position"], dtype=np.float32)  # null becomes NaN
    tokens_L = np.array(record["tokens_by_position"], dtype=np.int64)
    return {
        "step": record["step"],
        "kl": mean_kl(kl_L.astype(np.float64), tokens_L),
        "kl_by_position": kl_L,
        "prefix_length": record["prefix_length"],
        "prefix_tokens": record["prefix_tokens"],
        "flops": [record["flops"][part] or 0.0 for part in FLOPS_PARTS],
        "flops_full": sum(record["flops_full"][part] or 0.0 for part in FLOPS_PARTS),
        "seconds": record["seconds"],
        "skipped": bool(record.get("skipped")),
    }


def _load_evaluations(path: Path) -> tuple[EvaluationRecord, ...]:
    """By step; where a resumed run evaluated a step again, its last result."""
    by_step = {
        record["step"]: EvaluationRecord(**_known(record)) for record in jsonl.read_records(path)
    }
    return tuple(by_step[step] for step in sorted(by_step))


def _known(record: Mapping[str, Any]) -> dict[str, Any]:
    """What this version reads of a line that another may have written."""
    names = {field.name for field in fields(EvaluationRecord)}
    known = {name: value for name, value in record.items() if name in names}
    return {name: _or_nan(v) if name in _REALS else v for name, v in known.items()}


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def summarise(history: RunHistory, seconds: float | None = None) -> RunSummary:
    """``seconds``: of the whole job where the caller timed it; else the steps' own sum."""
    evaluations = history.evaluations
    measured = sum(float(values.sum()) for values in history.seconds.values())
    return RunSummary(
        steps=len(history.step),
        accuracy_before=evaluations[0].accuracy if evaluations else float("nan"),
        accuracy_after=evaluations[-1].accuracy if evaluations else float("nan"),
        eval_prompts=evaluations[-1].n if evaluations else 0,
        tokens_sampled=int(history.prefix_tokens.sum()),
        flops=float(history.flops.sum()),
        flops_full_opd=float(history.flops_full.sum()),
        seconds=measured if seconds is None else seconds,
    )


def write_summary(summary: RunSummary, path: Path) -> None:
    """``summary`` as a JSON object, NaN as null."""
    values = {
        name: jsonl.number(value) if isinstance(value, float) else value
        for name, value in asdict(summary).items()
    }
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
