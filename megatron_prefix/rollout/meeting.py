"""How a trainer and its servers become one process group: who is which rank, the store that they
meet at, and the trainer's side of the group."""

import itertools
import socket
from collections.abc import Sequence
from datetime import timedelta
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    GroupName,
    PrefixStore,
    _new_process_group_helper,
    _world,
)

from megatron_prefix.rollout.addresses import own_address
from megatron_prefix.rollout.client import SglangClient


def ranks(clients: Sequence[SglangClient], timeout_s: float) -> tuple[list[int], int]:
    """The first rank of each server, and the world size. Rank 0 is the trainer."""
    infos = [client.server_info(timeout_s=timeout_s, retries=0) for client in clients]
    sizes = [int(info["tp_size"]) for info in infos]
    ends = list(itertools.accumulate(sizes, initial=1))
    return ends[:-1], ends[-1]


def listen(
    urls: Sequence[str], world_size: int, timeout_s: float
) -> tuple[dist.TCPStore, str, int]:
    """A store on the one address that the servers reach this machine by, and on a free port."""
    parts = urlsplit(urls[0])
    assert parts.hostname, urls[0]
    address = own_address(parts.hostname, parts.port or 80)
    listener = socket.create_server((address, 0))
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),  # the store closes it
    )
    return store, address, port


def make_group(
    store: dist.Store, name: str, world_size: int, backend: str, timeout_s: float
) -> dist.ProcessGroup:
    """A group beside the default one, whatever that is: ``init_process_group`` can be called once
    a process, and ``new_group`` only has ranks of the default group. The two private names of
    torch are the same that the servers' side uses."""
    group, _ = _new_process_group_helper(
        world_size,
        0,
        [],
        Backend(backend),
        PrefixStore(name, store),
        group_name=GroupName(name),
        timeout=timedelta(seconds=timeout_s),
    )
    assert isinstance(group, dist.ProcessGroup), "rank 0 is a member"
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
    return group
