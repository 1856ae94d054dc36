"""A step's times of all ranks on rank 0: one small gather."""

import socket
import time

import numpy as np
import torch
import torch.distributed as dist

from megatron_prefix.health.slow_phases import StepTimes

_SIZE, _PRODUCTS = 160, 2  # a tenth of a millisecond of one CPU core


def gather_hosts() -> list[str]:
    """The machines of the default group's ranks, on each of them. Collective."""
    hosts: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return hosts


def gather_times(
    seconds: dict[str, float],
    stood_still: float,
    work: float,
    prefix_length: int,
    device: torch.device,
) -> StepTimes | None:
    """This rank's ``seconds`` by phase with the others'; on rank 0 alone. Collective over the
    default group, whose ranks all have the same phases."""
    own = torch.tensor([*seconds.values(), stood_still, work], dtype=torch.float64, device=device)
    first = dist.get_rank() == 0
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())] if first else None
    dist.gather(own, rows, dst=0)
    if rows is None:
        return None
    table = np.stack([row.cpu().numpy() for row in rows])
    return StepTimes(tuple(seconds), table[:, :-2], table[:, -2], table[:, -1], prefix_length)


def time_work(device: torch.device) -> float:
    """Seconds that a fixed piece of work takes on this rank, by itself."""
    matrix = torch.ones(_SIZE, _SIZE, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(_PRODUCTS):
        matrix = torch.mm(matrix, matrix).clamp_(max=1.0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
