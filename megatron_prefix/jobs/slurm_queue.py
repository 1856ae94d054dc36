"""What Slurm says of a job, and what is said to it: squeue, sacct, scontrol and scancel."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

ACTIVE = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "SPECIAL_EXIT")
UNKNOWN = "UNKNOWN"
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class JobState:
    """``state`` is Slurm's word; UNKNOWN where neither squeue nor sacct has the job any more."""

    number: int
    state: str
    reason: str = ""  # why it waits
    nodes: str = ""  # as Slurm writes them: node[1-3]
    exit_code: str = ""  # CODE:SIGNAL; empty while it is not over

    @property
    def runs(self) -> bool:
        return self.state in ACTIVE

    @property
    def waits(self) -> bool:
        return self.state in WAITING

    @property
    def ended(self) -> bool:
        return not self.runs and not self.waits


def check_can_submit(*, wait: bool) -> None:
    """ValueError where this machine cannot submit a job, or, with ``wait``, not be told of its end:
    nemo-run asks sacct, and cancels the job where it gets no answer."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            "--executor slurm: there is no sbatch here; give the command on a login node, or "
            "--dryrun for the scripts"
        )
    if wait and not _has_accounting():
        raise ValueError(
            "this cluster keeps no accounts (sacct), which nemo-run waits by; give --detach, then "
            "follow with megatron-prefix logs RUN -f"
        )


def _has_accounting() -> bool:
    return shutil.which("sacct") is not None and not _run("sacct", "-X", "-j", "1").returncode


def job_state(number: int) -> JobState:
    """From squeue, and where that has forgotten the job, from sacct.

    Raises ValueError where this machine has no squeue, or its controller does not answer.
    """
    if shutil.which("squeue") is None:
        raise ValueError(
            f"job {number} is Slurm's and there is no squeue here; ask on a login node"
        )
    shown = _run("squeue", f"--jobs={number}", "--states=all", "--noheader", "--format=%T|%R|%N")
    lines = shown.stdout.splitlines()
    if shown.returncode and "Invalid job id" not in shown.stderr:
        raise ValueError(f"squeue --jobs={number}: {' '.join(shown.stderr.split())}")
    if not lines:
        return _accounted(number)
    state, reason, nodes = lines[0].split("|", 2)  # of a heterogeneous job: its leader
    found = JobState(number, state, reason if state in WAITING else "", nodes)
    return found if not found.ended else _with_exit_code(found)


def _with_exit_code(found: JobState) -> JobState:
    accounted = _accounted(found.number)
    return accounted if accounted.state != UNKNOWN else found


def _accounted(number: int) -> JobState:
    if shutil.which("sacct") is None:
        return JobState(number, UNKNOWN)
    shown = _run("sacct", "-j", str(number), "-X", "--parsable2", "--format=JobID,State,ExitCode")
    rows = [line.split("|") for line in shown.stdout.splitlines()]
    if shown.returncode or len(rows) < 2:
        return JobState(number, UNKNOWN)
    row = dict(zip(rows[0], rows[1], strict=False))
    state = row.get("State", UNKNOWN).partition(" ")[0]  # CANCELLED by 1000
    return JobState(number, state, exit_code=row.get("ExitCode", ""))


def keep_from_requeue(number: int) -> None:
    """``scontrol requeue`` will refuse the job from now on, and so its own script's."""
    _expect("scontrol", "update", f"JobId={number}", "Requeue=0")


def signal_steps(number: int, name: str) -> None:
    """To the tasks of its steps; its batch script does not hear of it."""
    _expect("scancel", f"--signal={name}", str(number))


def cancel_job(number: int) -> None:
    _expect("scancel", str(number))


def _expect(*words: str) -> None:
    done = _run(*words)
    if done.returncode:
        raise ValueError(f"{' '.join(words)}: {' '.join(done.stderr.split())}")


def _run(*words: str) -> "subprocess.CompletedProcess[str]":
    command: Sequence[str] = words
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{words[0]} did not answer within {_TIMEOUT_S:g} s") from error
