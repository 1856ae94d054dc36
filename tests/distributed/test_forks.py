"""Nothing that a process forked outlives it, whenever it is killed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

from megatron_prefix.mcore.forks import die_with_parent
from megatron_prefix.rollout.guard import die_with_guard

FORKS = multiprocessing.get_context("fork")

# A rank that has made its queue and whose writer is held up by its storage.
RANK = """
import multiprocessing, os, time
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron_prefix.mcore.writers import ended_with_rank
from megatron_prefix.mcore.writers_queue import make_writers_queue

make_writers_queue()
writer = ended_with_rank(AsyncRequest(time.sleep, (600,), []))
multiprocessing.get_context("fork").Process(target=writer.async_fn, args=(600,)).start()
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(600)
"""


def exit_code(ask: Callable[[int], None], parent: int) -> int | None:
    child = FORKS.Process(target=ask, args=(parent,))
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("ask", [die_with_parent, die_with_guard])
def test_one_whose_parent_ended_before_it_asked_ends(ask: Callable[[int], None]) -> None:
    assert exit_code(ask, os.getpid()) == 0
    assert exit_code(ask, os.getppid()) == 1


def test_a_killed_rank_leaves_neither_its_queue_nor_a_writer() -> None:
    rank = subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout is not None
        children = [psutil.Process(int(pid)) for pid in rank.stdout.readline().split()]
        assert len(children) == 2
        assert all(child.is_running() for child in children)
    finally:
        os.kill(rank.pid, signal.SIGKILL)
        rank.wait()
    deadline = time.monotonic() + 60
    while any(map(lives, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, children))


def lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
