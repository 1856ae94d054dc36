"""The logs of a run's attempts: each start of a job has files of its own, side by side."""

import re
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from megatron_prefix.jobs.starts import LocalStart, SlurmJob, Start, read_starts

_POLL_S = 0.5
_LOOK_S = 5.0  # between two looks for another attempt, and at whether the run goes on


@dataclass(frozen=True)
class Attempt:
    name: str  # JOB.RESTARTS, or the launcher's process
    trainer: tuple[Path, ...]
    servers: tuple[Path, ...]

    def files(self, servers: bool) -> tuple[Path, ...]:
        return self.servers if servers else self.trainer


def run_attempts(folder: Path) -> list[Attempt]:
    """Of all starts that the run folder knows, oldest first."""
    return [attempt for start in read_starts(folder) for attempt in attempts_of(folder, start)]


def attempts_of(folder: Path, start: Start) -> list[Attempt]:
    if isinstance(start, LocalStart):
        own = Path(start.output or folder / "logs" / "rank_0.log")
        servers = sorted((folder / "logs").glob("*server-*.log"))  # teachers' too
        return [Attempt(str(start.pid), (own,) if own.is_file() else (), tuple(servers))]
    return _of_job(folder, start)


def _of_job(folder: Path, job: SlurmJob) -> list[Attempt]:
    """The scripts of slurm/ have a folder an attempt; nemo-run a file a step and attempt, the
    trainer's first."""
    found: dict[int, tuple[list[Path], list[Path]]] = {}
    for path in sorted((folder / "logs").glob(f"job-{job.number}.*/*.out")):
        sides = found.setdefault(int(path.parent.name.rpartition(".")[2]), ([], []))
        sides[path.name.startswith("servers")].append(path)
    logs = Path(job.logs) if job.logs else None
    for path in sorted(logs.glob(f"log-*_{job.number}_*.out")) if logs else ():
        match = re.search(r"_(\d+)\.out$", path.name)
        if match:
            sides = found.setdefault(int(match[1]), ([], []))
            sides[bool(sides[0])].append(path)
    return [
        Attempt(f"{job.number}.{number}", tuple(trainer), tuple(servers))
        for number, (trainer, servers) in sorted(found.items())
    ]


def choose(attempts: list[Attempt], name: str) -> Attempt:
    """The one of that name, or the newest; ValueError where there is none."""
    known = ", ".join(attempt.name for attempt in attempts)
    if not name and attempts:
        return attempts[-1]
    for attempt in attempts:
        if attempt.name == name:
            return attempt
    if name:
        raise ValueError(f"--attempt {name} is not one of the run's: {known or 'it has none yet'}")
    raise ValueError("the run has no log yet: it was never started, or still waits in the queue")


def last_lines(path: Path, count: int) -> Sequence[str]:
    """0: all of them."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return deque(file, maxlen=count or None)


class Follower:
    """Shows what is written to the newest attempt's files until the run has ended."""

    def __init__(self, folder: Path, servers: bool, goes_on: Callable[[], bool]) -> None:
        self._folder, self._servers, self._goes_on = folder, servers, goes_on
        self._open: dict[Path, TextIO] = {}
        self._mid_line = False

    def follow(self, lines: int) -> None:
        """From the last ``lines`` lines of the attempt that there is now."""
        looked, on = 0.0, True
        while on:
            if time.monotonic() - looked > _LOOK_S:
                on, looked = self._goes_on(), time.monotonic()
                self._open_new(lines)
                lines = 0  # a later attempt is shown from its first line on
            moved = [self._copy(file) for file in self._open.values()]
            if on and not any(moved):
                time.sleep(_POLL_S)
        for file in self._open.values():
            self._copy(file)
            file.close()

    def _open_new(self, lines: int) -> None:
        attempts = run_attempts(self._folder)
        for path in attempts[-1].files(self._servers) if attempts else ():
            if path in self._open:
                continue
            for file in self._open.values():  # an attempt's last words come before the next one
                self._copy(file)
            start = "\n" if self._mid_line else ""
            self._show(f"{start}==> {attempts[-1].name}: {path} <==\n")
            self._open[path] = path.open(encoding="utf-8", errors="replace")
            self._show("".join(deque(self._open[path], maxlen=lines or None)))

    def _copy(self, file: TextIO) -> bool:
        text = file.read()
        self._show(text)
        return bool(text)

    def _show(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        if text:
            self._mid_line = not text.endswith("\n")
