"""The trainer's side of weight publishing: rank 0 of a process group whose other ranks are servers.

The trainer listens on a TCPStore of its own, tells each server by HTTP to join, and broadcasts
buckets of weights to them: uint8 concatenations that the servers cut up and load. gloo on CPUs,
NCCL on GPUs. All of it runs on one rank of the trainer; the others take no part.
"""

import concurrent.futures
import contextlib
import itertools
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
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
from megatron_prefix.rollout.protocol import SglangError, version_label

_JOIN = "join the weight group"
_WORDS_S = 2.0  # after a failure, for the other servers' words about it
_PARTING_S = 5.0  # for each thing that a server is told when a group ends; it may hang
Bucket = list[tuple[str, torch.Tensor]]  # Hugging Face names


class WeightSyncFailed(SglangError):
    """Weights did not reach every server; which ones a server now holds is unknown."""


@dataclass(frozen=True)
class PublishStats:
    policy_version: int
    buckets: int
    tensors: int
    bytes: int
    seconds: float


class WeightGroup:
    """The group, joined. Made by :meth:`join`; after a failure, join again."""

    def __init__(
        self,
        clients: Sequence[SglangClient],
        name: str,
        group: dist.ProcessGroup,
        store: dist.Store,
        timeout_s: float,
    ) -> None:
        self.name = name  # the servers' for it; no other start has it
        self._clients = list(clients)
        self._group = group
        self._store = store  # the servers' connections end with it
        self._timeout_s = timeout_s
        self._broken = False
        self._opening: list[concurrent.futures.Future[None]] = []
        self._threads = concurrent.futures.ThreadPoolExecutor(
            max_workers=len(self._clients), thread_name_prefix="weights"
        )

    @classmethod
    def join(
        cls, clients: Sequence[SglangClient], *, backend: str, timeout_s: float = 120.0
    ) -> "WeightGroup":
        """Meet all servers. ``backend`` is gloo or nccl; ``timeout_s`` also limits a broadcast.

        Raises WeightSyncFailed naming the server that refused or did not come.
        """
        name = f"weights-{secrets.token_hex(6)}"  # a server hangs on one that it had before
        ranks, world_size = _ranks(clients, timeout_s)
        store, address, port = _listen([client.url for client in clients], world_size, timeout_s)

        def invite(client: SglangClient, rank: int) -> None:
            client.join_weight_group(
                address=address,
                port=port,
                rank=rank,
                world_size=world_size,
                name=name,
                backend=backend,
            )

        invitations = [
            _in_thread(invite, client, rank) for client, rank in zip(clients, ranks, strict=True)
        ]
        # In a thread too: without all members it returns at its timeout only, and an invitation
        # that was refused should be heard of at once.
        meeting = _in_thread(_make_group, store, name, world_size, backend, timeout_s)
        _first_failure([*invitations, meeting], timeout_s, _JOIN)
        return cls(clients, name, meeting.result(), store, timeout_s)

    def open(self) -> None:
        """Begin the next update in the background: servers are idle while a step computes, and
        beginning costs as much as sending a small model. :meth:`publish` goes on from there."""
        if not self._broken and not self._opening:
            self._opening = [
                self._threads.submit(client.begin_weight_update, timeout_s=self._timeout_s)
                for client in self._clients
            ]

    def cancel(self) -> None:
        """End an update that was opened and is not needed."""
        if self._opening:
            self._begun()
            self._end_on_all()

    def _begun(self) -> None:
        self.open()
        opening, self._opening = self._opening, []
        _first_failure(opening, self._timeout_s, "begin a weight update")

    def publish(self, buckets: Iterable[Bucket], policy_version: int) -> PublishStats:
        """Send a whole model, bucket by bucket, and name it ``policy_version``.

        Two buckets are held at a time: the servers take the new name with the last one, so which
        one is the last has to be known before it goes. Tensors are on this rank's device, in any
        dtype: the servers convert to theirs.

        Raises WeightSyncFailed; the group is then of no more use.
        """
        if self._broken:
            raise WeightSyncFailed("this weight group failed before; join a new one")
        started_at = time.monotonic()
        count = tensors = size = 0
        try:
            self._begun()
            for bucket, last in _marking_last(buckets):
                size += self._send(bucket, policy_version if last else None)
                count, tensors = count + 1, tensors + len(bucket)
            self._end_on_all()
        except BaseException:
            self._abandon()
            raise
        assert count, "no weights to publish"
        seconds = time.monotonic() - started_at
        return PublishStats(policy_version, count, tensors, size, seconds)

    def _send(self, bucket: Bucket, policy_version: int | None) -> int:
        """Broadcast one bucket; returns its bytes. ``None``: more are to come."""
        # Wide types first: the servers view each tensor at its offset, which must be aligned.
        ordered = sorted(bucket, key=lambda named: -named[1].element_size())
        flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in ordered])
        body = {
            "names": [name for name, _ in ordered],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in ordered],
            "shapes": [list(tensor.shape) for _, tensor in ordered],
            "group_name": self.name,
            "load_format": "flattened_bucket",
            # Once a model: what the cache holds stays wrong until the last tensor has come.
            "flush_cache": policy_version is not None,
        }
        if policy_version is not None:
            body["weight_version"] = version_label(policy_version)
        posts = [
            self._threads.submit(client.receive_weights, body, timeout_s=self._timeout_s)
            for client in self._clients
        ]
        # In a thread too: without the servers it does not return, and one may have refused.
        sending = _in_thread(_broadcast, flat, self._group)
        _first_failure([*posts, sending], self._timeout_s, "receive weights")
        return flat.numel()

    def _end_on_all(self) -> None:
        futures = [
            self._threads.submit(client.end_weight_update, timeout_s=self._timeout_s)
            for client in self._clients
        ]
        _first_failure(futures, self._timeout_s, "end a weight update")

    def _abandon(self) -> None:
        """Hang up, so that servers that wait for a broadcast fail now and not at their timeout."""
        self._broken = True
        self._group.abort()
        for client in self._clients:
            with contextlib.suppress(SglangError):  # it may be the one that failed
                client.end_weight_update(timeout_s=_PARTING_S)
        self._leave()

    def _leave(self) -> None:
        for client in self._clients:
            with contextlib.suppress(SglangError):  # a server that is gone has left
                client.leave_weight_group(self.name, timeout_s=_PARTING_S)

    def close(self) -> None:
        """Leave the group; servers that still run leave it too."""
        if not self._broken:
            self._broken = True
            self._leave()
            dist.destroy_process_group(self._group)
        self._threads.shutdown(wait=False, cancel_futures=True)


def publish_from_disk(
    clients: Sequence[SglangClient], folder: str | Path, policy_version: int
) -> None:
    """The fallback: every server loads ``folder``, which it must be able to read.

    Raises RequestRefused with the server's words; it then keeps the weights that it had.
    """
    path = str(Path(folder).resolve())
    with concurrent.futures.ThreadPoolExecutor(max_workers=len(clients)) as threads:
        futures = [
            threads.submit(client.load_weights, path, policy_version=policy_version)
            for client in clients
        ]
        for future in futures:
            future.result()


def _ranks(clients: Sequence[SglangClient], timeout_s: float) -> tuple[list[int], int]:
    """The first rank of each server, and the world size. Rank 0 is the trainer."""
    infos = [client.server_info(timeout_s=timeout_s, retries=0) for client in clients]
    sizes = [int(info["tp_size"]) for info in infos]
    ends = list(itertools.accumulate(sizes, initial=1))
    return ends[:-1], ends[-1]


def _listen(
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


def _make_group(
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


def _broadcast(flat: torch.Tensor, group: dist.ProcessGroup) -> None:
    if flat.is_cuda:
        torch.cuda.set_device(flat.device)  # a thread starts with device 0
    dist.broadcast(flat, src=0, group=group)


def _in_thread[T](call: Callable[..., T], *arguments: Any) -> concurrent.futures.Future[T]:
    """As an executor's submit, in a daemon thread: an interpreter that exits waits for no other."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except Exception as error:  # noqa: BLE001 - raised where the future is read
            future.set_exception(error)

    threading.Thread(target=run, name="weights", daemon=True).start()
    return future


def _first_failure(
    futures: Sequence[concurrent.futures.Future[Any]], timeout_s: float, doing: str
) -> None:
    """Wait for all; where one fails, or after ``timeout_s``, raise WeightSyncFailed.

    Several fail together: a server refuses and hangs up. The earlier of ``futures`` is reported,
    which is a server's answer where there is one.
    """
    done, pending = concurrent.futures.wait(
        futures, timeout_s, return_when=concurrent.futures.FIRST_EXCEPTION
    )
    if any(future.exception() for future in done):
        concurrent.futures.wait(futures, _WORDS_S)
    errors = [future.exception() for future in futures if future.done()]
    for error in filter(None, errors):
        raise WeightSyncFailed(f"a server could not {doing}: {error}") from error
    if pending:
        raise WeightSyncFailed(f"a server did not {doing} within {timeout_s:g} s")


def _marking_last(buckets: Iterable[Bucket]) -> Iterator[tuple[Bucket, bool]]:
    """Each bucket, and whether it is the last."""
    iterator = iter(buckets)
    bucket = next(iterator, None)
    while bucket is not None:
        following = next(iterator, None)
        yield bucket, following is None
        bucket = following
