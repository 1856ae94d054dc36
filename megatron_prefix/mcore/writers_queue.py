"""The process through which a save's writers tell their rank what they wrote.

Megatron-Core 0.19.2 spawns one that has Python's own handlers: a signal to all of a job's processes
ends it, and with it the save that the signal asked for; and it outlives a rank that is killed.
"""

import multiprocessing
import os
import signal
from multiprocessing.managers import SyncManager

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_prefix.mcore.forks import die_with_parent

_TOLD_TO_RANKS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def make_writers_queue() -> None:
    """Before a rank's first save, in place of the one that Megatron would make then."""
    if filesystem_async._results_queue is not None:
        return
    # A spawned process imports torch anew; a fork is safe where there is no CUDA.
    method = "spawn" if torch.cuda.is_available() else "fork"
    manager = SyncManager(ctx=multiprocessing.get_context(method))
    manager.start(initializer=_live_with_rank, initargs=(os.getpid(),))
    filesystem_async._results_queue = manager.Queue()


def _live_with_rank(rank: int) -> None:
    for number in _TOLD_TO_RANKS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(rank)
