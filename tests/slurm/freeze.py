"""Stops ranks until a signal has reached them, so that no test has to be quicker than a rank."""

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from tests.slurm.virtual_slurm import VirtualSlurm, wait_until

PATIENCE_S = 900.0  # a start is 20 s of imports on idle cores, and minutes on busy ones


@contextlib.contextmanager
def frozen_until_signalled(slurm: VirtualSlurm) -> Iterator[None]:
    """Stops the ranks, so that they cannot finish first, until Slurm's signal waits for them."""
    ranks = rank_pids(slurm)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    yield
    wait_until(lambda: all(map(signalled, ranks)), "a signal from Slurm", PATIENCE_S)
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):  # it has saved and ended already
            os.kill(pid, signal.SIGCONT)


def rank_pids(slurm: VirtualSlurm) -> list[int]:
    """Of all nodes. Writers of checkpoints are forks of ranks, with the same command line."""
    parents = dict(pair for name in slurm.names for pair in _rank_commands(slurm, name))
    ranks = [pid for pid, parent in parents.items() if parent not in parents]
    assert ranks
    return ranks


def _rank_commands(slurm: VirtualSlurm, name: str) -> Iterator[tuple[int, int]]:
    """Processes of a node that the agent or the launcher made a rank, each with its parent."""
    for pid in slurm.pids(name):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            program = words[2] if len(words) > 2 else b""  # python -c ..., python -m ...
            if b"multiprocessing.spawn" in program or program == b"megatron_prefix.worker":
                status = Path(f"/proc/{pid}/status").read_text()
                yield pid, int(status.partition("PPid:")[2].split()[0])


def signalled(pid: int) -> bool:
    """Whether a USR1 or TERM is pending, or the process runs again: a TERM comes with a CONT,
    and on an idle machine it may have ended by now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    pending = sum(1 << (number - 1) for number in (signal.SIGUSR1, signal.SIGTERM))
    masks = re.findall(r"^(?:Sig|Shd)Pnd:\s*([0-9a-f]+)", status, flags=re.MULTILINE)
    assert len(masks) == 2, status
    stopped = re.search(r"^State:\s*T", status, flags=re.MULTILINE)
    return not stopped or any(int(mask, 16) & pending for mask in masks)
