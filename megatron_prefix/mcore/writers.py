"""The processes that write a checkpoint beside the ranks, and the wait for them."""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest

from megatron_prefix.mcore.forks import die_with_parent
from megatron_prefix.mcore.sealing import Tell

_POLL_S = 0.02  # between two looks whether they are done
_LOOK_S = 1.0  # between two looks at the files


def ended_with_rank(request: AsyncRequest) -> AsyncRequest:
    """``request`` with a writer that the kernel ends when this rank ends: nobody completes what is
    written after that, and a writer that its storage holds up would stay behind."""
    if request.async_fn is None:  # nothing of the checkpoint is this rank's to write
        return request
    return request._replace(async_fn=functools.partial(_write, os.getpid(), request.async_fn))


def _write(rank: int, write: Callable[..., Any], *arguments: Any, **named: Any) -> None:
    die_with_parent(rank)
    write(*arguments, **named)


def await_writers(queue: AsyncCallsQueue, folder: Path, goes_on: Tell) -> None:
    """Until what was begun last, in ``folder``, is written and joined. Collective: every rank looks
    after its own writer, and all go on together.

    ``goes_on`` is called on rank 0 while files grow, and on the others while rank 0 looks.
    """
    first, before, looked_at = dist.get_rank() == 0, 0, time.monotonic()
    while queue.get_num_unfinalized_calls():
        if queue.maybe_finalize_async_calls():
            return
        time.sleep(_POLL_S)
        if not first:
            goes_on()
        elif time.monotonic() - looked_at > _LOOK_S:
            looked_at, now = time.monotonic(), _size(folder)
            if now != before:
                goes_on()
            before = now


def _size(folder: Path) -> int:
    """Bytes of the files, and those that have come to the disk: a flush shows in the second."""
    stats = [file.stat() for file in folder.iterdir()]
    return sum(stat.st_size + 512 * stat.st_blocks for stat in stats)
