"""The rank runner itself: it must not hide a failure or leave a process."""

import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import run_ranks


def _sum_of_ranks(start: int) -> int:
    total = torch.tensor(start + dist.get_rank())
    dist.all_reduce(total)
    return int(total)


def _fail_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise KeyError("seven")
    dist.barrier()


def _sleep_on_first_rank() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def test_results_come_back_by_rank() -> None:
    assert run_ranks(3, _sum_of_ranks, 10) == [33, 33, 33]


def test_a_failure_carries_its_traceback_and_frees_the_waiting_ranks() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 of 2 failed(.|\n)*KeyError: 'seven'"):
        run_ranks(2, _fail_on_last_rank)
    assert multiprocessing.active_children() == []


def test_a_rank_that_hangs_is_named() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0.*\] of 2"):
        run_ranks(2, _sleep_on_first_rank, timeout_s=3)
    assert multiprocessing.active_children() == []
