"""A save that a signal asks for goes well though the signal went to all processes."""

import multiprocessing
import os
import signal
import time

from tests.distributed.ranks import run_ranks


def signalled() -> tuple[bool, str]:
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_prefix.mcore.writers_queue import make_writers_queue

    make_writers_queue()
    queue = filesystem_async.get_write_results_queue()
    (process,) = multiprocessing.active_children()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        os.kill(process.pid, number)
    time.sleep(0.2)
    queue.put("written")
    return process.is_alive(), queue.get(timeout=5.0)


def test_the_queue_outlives_signals() -> None:
    assert run_ranks(1, signalled) == [(True, "written")]
