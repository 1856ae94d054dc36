"""Ends a run: its ranks save first, nothing requeues it, and it can be gone on with later."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_prefix.jobs.slurm_queue import (
    JobState,
    cancel_job,
    job_state,
    keep_from_requeue,
    signal_steps,
)
from megatron_prefix.jobs.starts import LocalStart, SlurmJob, read_starts

_POLL_S = 1.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class Patience:
    save_s: float  # given to a save; 0: none is asked for
    end_s: float = 60.0  # given to what was cut off


def cancel_run(folder: Path, patience: Patience, say: Say) -> bool:
    """Whether all that ran had time to end by itself. True where nothing ran.

    Jobs that wait leave the queue first, so that none starts where another ends. ValueError where
    a process is another machine's, or Slurm does not answer.
    """
    starts = read_starts(folder)
    jobs = [job_state(start.number) for start in starts if isinstance(start, SlurmJob)]
    processes = [start for start in starts if isinstance(start, LocalStart) and not _over(start)]
    for job in jobs:
        if job.waits:
            cancel_job(job.number)
            say(f"job {job.number} was {job.state}: taken out of the queue")
    ended = [_end_job(job, patience, say) for job in jobs if job.runs]
    ended += [_end_process(process, patience, say) for process in processes]
    return all(ended)


def _over(start: LocalStart) -> bool:
    """ValueError where only another machine knows, and its run may be going on."""
    if start.ended is not None:
        return True
    if not start.is_here:
        raise ValueError(
            f"process {start.pid} of {start.host} started this run and may run still; give the "
            f"command on {start.host}"
        )
    return not start.runs()


def _end_job(job: JobState, patience: Patience, say: Say) -> bool:
    number = job.number
    try:
        keep_from_requeue(number)
        if patience.save_s:
            signal_steps(number, "USR1")
            say(f"job {number}: told to save; up to {patience.save_s:g} s (--now: without)")
    except ValueError:  # Slurm takes no word to a job that has ended since it was asked
        if not _wait_for_end(number, patience.end_s, say):
            raise
        return True
    if patience.save_s and _wait_for_end(number, patience.save_s, say):
        return True
    cancel_job(number)
    say(f"job {number}: cancelled")
    _wait(lambda: not job_state(number).runs, patience.end_s)
    return not patience.save_s


def _wait_for_end(number: int, seconds: float, say: Say) -> bool:
    """Whether the job ended by itself; where it is in the queue again, it is taken out."""
    if not _wait(lambda: not job_state(number).runs, seconds):
        return False
    if job_state(number).waits:
        cancel_job(number)
    say(f"job {number}: ended by itself")
    return True


def _end_process(start: LocalStart, patience: Patience, say: Say) -> bool:
    """A launcher's first signal saves, its second ends at once; SIGKILL, and the kernel ends its
    ranks and servers."""
    name = f"process {start.pid}"
    if patience.save_s:
        _signal(start, signal.SIGTERM)
        say(f"{name}: told to save; up to {patience.save_s:g} s (--now: without)")
        if _wait(lambda: not start.runs(), patience.save_s):
            say(f"{name}: ended by itself")
            return True
    _signal(start, signal.SIGKILL)
    say(f"{name}: killed")
    _wait(lambda: not start.runs(), patience.end_s)
    return not patience.save_s


def _signal(start: LocalStart, number: signal.Signals) -> None:
    """Nothing where it has ended since, while others were waited for: its number may be another
    process's by now."""
    if start.runs():
        with contextlib.suppress(ProcessLookupError):
            os.kill(start.pid, number)


def _wait(done: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
