"""JSON lines of a run folder: written whole and flushed, read leniently, cut back on a resume.

A line that a killed process left half written is no record: readers leave it out, and
:func:`keep_until` moves it away with the lines of steps that a resumed run takes again.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from megatron_prefix.run_files.whole_file import whole_file
from megatron_prefix.types import Flops

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"
PROBES = "probes.jsonl"
EVENTS = "events.jsonl"
EVALUATION_FOLDER = "evaluations"  # every answer of an evaluation, step_N.jsonl


def number(value: float) -> float | None:
    """``value`` as JSON can hold it: null for NaN and the infinities."""
    return float(value) if math.isfinite(value) else None


def significant(values: np.ndarray, digits: int = 6) -> list[float | None]:
    """``values [n]`` rounded to significant digits, NaN and the infinities as None.

    A rounded value is a third of a float64's text, which is most of a line of long prefixes.
    """
    return [float(f"{x:.{digits}g}") if math.isfinite(x) else None for x in values.tolist()]


def flops_record(flops: Flops) -> dict[str, float | None]:
    return {
        "rollout": number(flops.rollout),
        "teacher": number(flops.teacher),
        "student": number(flops.student),
    }


def metrics_record(metrics: object) -> dict[str, Any]:
    """Every field of a dataclass of figures in JSON's types."""
    record: dict[str, Any] = {}
    for name, value in vars(metrics).items():
        if isinstance(value, np.ndarray):
            record[name] = significant(value) if value.dtype.kind == "f" else value.tolist()
        elif isinstance(value, Flops):
            record[name] = flops_record(value)
        elif isinstance(value, dict):
            record[name] = {key: number(item) for key, item in value.items()}
        else:
            record[name] = number(value) if isinstance(value, float) else value
    return record


class JsonLines:
    """Appends records to a file; each is on disk's way (flushed) when ``write`` returns."""

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of ``path``, one at a time; none where there is no file.

    Raises ValueError (file and line) for a line in the middle that is no JSON object.
    """
    return (record for _, record in _records(path) if record is not None)


def is_cut(path: Path) -> bool:
    """Whether the last line has no end: a writer was killed in it, or is at it right now."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def keep_until(path: Path, step: int) -> int:
    """Leaves the records of steps up to ``step`` in ``path``; the count of lines moved away.

    The others go to ``<stem>.discarded.jsonl``, so that a step which a resumed run takes again is
    counted once and its first try can still be read.
    """
    moved = sum(1 for _, record in _records(path) if not _is_kept(record, step))
    if moved:
        discarded = path.with_name(f"{path.stem}.discarded.jsonl")
        with (
            whole_file(path) as kept,
            kept.open("w", encoding="utf-8") as kept_file,
            discarded.open("a", encoding="utf-8") as moved_file,
        ):
            for line, record in _records(path):
                (kept_file if _is_kept(record, step) else moved_file).write(line + "\n")
    return moved


def _is_kept(record: Mapping[str, Any] | None, step: int) -> bool:
    return record is not None and int(record["step"]) <= step


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each line with its record, or with None for a last line without its end."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for i, line in enumerate(file, start=1):
            whole = line.endswith("\n")
            record = _parse(line) if whole else None
            if whole and record is None:
                raise ValueError(f"{path}:{i} is no JSON object: repair or remove that line")
            yield line.removesuffix("\n"), record


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None
