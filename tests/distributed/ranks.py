"""Runs a function on several gloo ranks, forked out of the test: imports are paid for once."""

import multiprocessing
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Calls ``fn(*args)`` on every rank of a fresh gloo world; returns the results by rank.

    The world is the default process group, over a file store. Results are pickled. The first
    rank that fails ends the run: its traceback is raised as RuntimeError. TimeoutError names the
    ranks that did not come back. No process outlives the call.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_rank_main, args=(rank, world_size, Path(folder), timeout_s, fn, args)
            )
            for rank in range(world_size)
        ]
        try:
            _start(ranks)
            _wait(ranks, Path(folder), time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()
        return [
            pickle.loads(_result(Path(folder), rank).read_bytes()) for rank in range(world_size)
        ]


def _start(ranks: list[BaseProcess]) -> None:
    with warnings.catch_warnings():
        # torch's idle thread pools make every test process multi-threaded; no rank uses them.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", append=False)
        for process in ranks:
            process.start()


def _rank_main(
    rank: int,
    world_size: int,
    folder: Path,
    timeout_s: float,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        result = pickle.dumps(fn(*args))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        _failure(folder, rank).write_text(f"{time.monotonic_ns()}\n{traceback.format_exc()}")
        raise SystemExit(1) from None
    _result(folder, rank).write_bytes(result)


def _wait(ranks: list[BaseProcess], folder: Path, deadline: float) -> None:
    """Returns when all ranks have ended well; raises as soon as one has not."""
    while True:
        codes = [process.exitcode for process in ranks]
        if any(codes):
            raise RuntimeError(_first_failure(codes, folder))
        if None not in codes:
            return
        if time.monotonic() > deadline:
            late = [rank for rank, code in enumerate(codes) if code is None]
            raise TimeoutError(f"ranks {late} of {len(ranks)} did not end in time")
        time.sleep(0.01)


def _first_failure(codes: list[int | None], folder: Path) -> str:
    """The cause: a rank that fails writes its time before its peers can miss it."""
    told = {
        rank: _failure(folder, rank).read_text().split("\n", 1)
        for rank in range(len(codes))
        if _failure(folder, rank).exists()
    }
    if not told:
        return f"ranks died without a word; exit codes by rank: {codes}"
    rank = min(told, key=lambda rank: int(told[rank][0]))
    return f"rank {rank} of {len(codes)} failed:\n{told[rank][1]}"


def _result(folder: Path, rank: int) -> Path:
    return folder / f"result_{rank}"


def _failure(folder: Path, rank: int) -> Path:
    return folder / f"failure_{rank}"
