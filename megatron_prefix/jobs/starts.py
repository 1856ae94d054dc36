"""Which jobs and processes a run was started as: ``jobs.jsonl`` in its folder, a line a start.

``status``, ``logs`` and ``cancel`` read it; those that start a run write it. No value of the
environment and no argument is kept.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JOBS = "jobs.jsonl"


@dataclass(frozen=True)
class SlurmJob:
    """``logs``: where nemo-run has the steps' output; empty: in the run folder."""

    number: int
    logs: str = ""


@dataclass(frozen=True)
class LocalStart:
    """A launcher's process. ``born``: when it started, in seconds since 1970, since its number is
    given to others after it; ``output``: the file that it writes to, empty where that is none."""

    host: str
    pid: int
    born: float
    output: str = ""
    ended: int | None = None  # its exit code; None: it runs, or was killed

    def runs(self) -> bool:
        """Whether the process is alive; to be asked on ``host`` alone."""
        import psutil

        try:
            found = psutil.Process(self.pid)
            same = abs(found.create_time() - self.born) < 2.0  # clocks are set now and then
            return same and found.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @property
    def is_here(self) -> bool:
        return self.host == socket.gethostname()


Start = SlurmJob | LocalStart


def note_slurm_job(folder: Path, number: int, logs: str = "") -> None:
    """Once a job: requeued, it is the same one."""
    if not any(isinstance(s, SlurmJob) and s.number == number for s in read_starts(folder)):
        _append(folder, {"executor": "slurm", **asdict(SlurmJob(number, logs))})


def note_own_job(folder: Path) -> None:
    """The job of whoever calls this in a batch script; nothing outside of one."""
    number = os.environ.get("SLURM_JOB_ID", "")
    if number:
        note_slurm_job(folder, int(os.environ.get("SLURM_HET_JOB_ID") or number))


def note_this_process(folder: Path) -> LocalStart | None:
    """This process as the run's launcher; None within a job that is known already."""
    import psutil

    number = os.environ.get("SLURM_JOB_ID", "")
    if any(isinstance(s, SlurmJob) and str(s.number) == number for s in read_starts(folder)):
        return None
    born = psutil.Process().create_time()
    start = LocalStart(socket.gethostname(), os.getpid(), born, _output_file())
    _append(folder, {"executor": "local", **asdict(start)})
    return start


def note_end(folder: Path, start: LocalStart | None, code: int) -> None:
    if start is not None:
        _append(folder, {"executor": "local", **asdict(start), "ended": code})


def read_starts(folder: Path) -> list[Start]:
    """Oldest first, each once, with its end where it has one. A line that another version wrote, or
    that was cut short, is left out."""
    found: dict[tuple[object, ...], Start] = {}
    path = folder / JOBS
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        start = _parse(line)
        if isinstance(start, SlurmJob):
            found.setdefault(("slurm", start.number), start)
        elif start is not None:
            found[(start.host, start.pid, start.born)] = start
    return list(found.values())


def _parse(line: str) -> Start | None:
    try:
        record = json.loads(line)
        kind = {"slurm": SlurmJob, "local": LocalStart}[record.pop("executor")]
        record.pop("time")
        return kind(**record)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _append(folder: Path, record: Mapping[str, Any]) -> None:
    """In one write: two jobs of a chain may do so at a time."""
    line = json.dumps({"time": time.time(), **record}) + "\n"
    with (folder / JOBS).open("a", encoding="utf-8") as file:
        file.write(line)


def _output_file() -> str:
    """The file behind this process's standard output; empty for a terminal or a pipe."""
    target = Path("/proc/self/fd/1").resolve()
    return str(target) if target.is_file() else ""
