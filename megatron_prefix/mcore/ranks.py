"""Runs a function on ranks of a fresh process group on this machine, for tools: no torchrun."""

import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

TIMEOUT_S = 1800.0


def run_on_ranks(world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls ``fn(*args)`` on every rank; returns the picklable results by rank.

    gloo and forked processes without a GPU; NCCL, one GPU a rank and fresh processes with them.
    A ValueError of a rank is raised here in its own words; any other error ends all ranks and is
    raised as torch's ProcessRaisedException with the rank's traceback.
    """
    cuda = torch.cuda.is_available()
    if cuda and world_size > torch.cuda.device_count():
        raise ValueError(
            f"the layout needs {world_size} GPUs and this machine has {torch.cuda.device_count()}"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        try:
            multiprocessing.start_processes(
                _rank_main,
                args=(world_size, folder, fn, args),
                nprocs=world_size,
                start_method="spawn" if cuda else "fork",
            )
        except multiprocessing.ProcessExitedException as error:
            refusals = sorted(folder.glob("refused_*"))
            if not refusals:
                raise
            raise ValueError(refusals[0].read_text()) from error
        return [pickle.loads((folder / f"result_{r}").read_bytes()) for r in range(world_size)]


def _rank_main(
    rank: int, world_size: int, folder: Path, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    from megatron_prefix.mcore.cpu import adapt_to_cpu

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a tool's own handler would wait for Python
    if adapt_to_cpu():
        # A fork does not inherit OpenMP's threads, and would wait for them for ever.
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    try:
        result = pickle.dumps(fn(*args))
    except ValueError as error:
        (folder / f"refused_{rank}").write_text(str(error))
        os._exit(1)  # peers may wait in a collective: nothing is waited for here
    (folder / f"result_{rank}").write_bytes(result)
    dist.barrier()
    dist.destroy_process_group()
