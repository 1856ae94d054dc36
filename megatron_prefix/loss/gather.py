"""Gathering one tensor of each tensor-parallel rank: in a fixed order, unlike a reduction's."""

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def start_all_gather(own: Tensor, group: ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Everyone's ``own`` as [R, *own.shape] in rank order, once the work has been waited for.

    ``own`` is contiguous, of one shape and dtype on all R ranks, and must live until then.
    """
    # torch 2.14 warns of the older name, which is all that torch 2.11 has.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    everyone = own.new_empty((group.size(), *own.shape))
    work = gather(everyone.view(-1), own.view(-1), group=group, async_op=True)
    assert work is not None
    return everyone, work


def all_gather(own: Tensor, group: ProcessGroup | None) -> Tensor:
    """As :func:`start_all_gather`, waited for; of one rank where there is no group."""
    if group is None or group.size() == 1:
        return own[None]
    everyone, work = start_all_gather(own, group)
    work.wait()
    return everyone
