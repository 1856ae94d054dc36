"""Work shared between forked processes on this machine, without a process group."""

import ctypes
import multiprocessing
import multiprocessing.process
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

OnBytes = Callable[[int], object]
Work = Callable[[int, OnBytes], Any]
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> None:
    """From now on the kernel kills this process when ``parent``, which forked it, ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was asked
        os._exit(1)


def run_forked(count: int, work: Work, on_bytes: OnBytes) -> list[Any]:
    """``work(rank, on_bytes)`` in ``count`` processes; the picklable results by rank.

    One is run right here. A ValueError or an OSError of a process is raised here in its own words;
    any other error ends its process with a traceback, and is a RuntimeError here, as where one was
    killed. The others are ended then, and where this process is killed.
    """
    if count == 1:
        return [work(0, on_bytes)]
    context = multiprocessing.get_context("fork")
    receivers: list[Connection] = []
    processes: list[multiprocessing.process.BaseProcess] = []
    try:
        for rank in range(count):
            receiver, sender = context.Pipe(duplex=False)
            child = (rank, work, sender, os.getpid())
            processes.append(context.Process(target=_child, args=child, daemon=True))
            processes[-1].start()
            # Before the next one is forked, so that the pipe ends with its process alone.
            sender.close()
            receivers.append(receiver)
        return _collect(receivers, on_bytes)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _collect(receivers: list[Connection], on_bytes: OnBytes) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [r for rank, r in enumerate(receivers) if rank not in results]
        for ready in wait(waiting):
            rank = receivers.index(ready)  # type: ignore[arg-type]
            try:
                kind, value = receivers[rank].recv()
            except EOFError as error:
                died = f"process {rank} of {len(receivers)} died; what it said is above"
                raise RuntimeError(died) from error
            if kind == "bytes":
                on_bytes(value)
            elif kind == "done":
                results[rank] = value
            else:
                raise value
    return [results[rank] for rank in range(len(receivers))]


def _child(rank: int, work: Work, sender: Connection, parent: int) -> None:
    import torch

    # The parent is told of a Ctrl-C as well, and ends its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent)

    # A fork does not inherit OpenMP's threads, and would wait for them for ever.
    torch.set_num_threads(1)
    try:
        sender.send(("done", work(rank, lambda size: sender.send(("bytes", size)))))
    except (ValueError, OSError) as error:
        sender.send(("error", error))
