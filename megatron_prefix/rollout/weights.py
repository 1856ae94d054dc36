"""The trainer's side of weight publishing: rank 0 of a process group whose other ranks are servers.

The trainer listens on a TCPStore of its own, tells each server by HTTP to join, and broadcasts
buckets of weights to them: uint8 concatenations that the servers cut up and load. gloo on CPUs,
NCCL on GPUs. All of it runs on one rank of the trainer; the others take no part.
"""

import concurrent.futures
import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.meeting import listen, make_group, ranks
from megatron_prefix.rollout.protocol import NoAnswer, RequestRefused, SglangError, version_label

_JOIN = "join the weight group"
_WORDS_S = 2.0  # after a failure, for the other servers' words about it
_NCCL_LATER_S = 60.0  # after our own timeout
_PARTING_S = 5.0  # for each thing that a server is told when a group ends; it may hang
Bucket = list[tuple[str, torch.Tensor]]  # Hugging Face names


class WeightSyncFailed(SglangError):
    """Weights did not reach every server; which ones a server now holds is unknown.

    ``silent``: by URL, the servers that answered nothing while others did, and for how many
    seconds. Empty where that cannot be told.
    """

    silent: Mapping[str, float] = MappingProxyType({})


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
        self._asked: list[concurrent.futures.Future[None]] = []  # the last calls, one a client
        self._asked_at = 0.0
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
        first_ranks, world_size = ranks(clients, timeout_s)
        store, address, port = listen([client.url for client in clients], world_size, timeout_s)

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
            _in_thread(invite, client, rank)
            for client, rank in zip(clients, first_ranks, strict=True)
        ]
        # In a thread too: without all members it returns at its timeout only, and an invitation
        # that was refused should be heard of at once.
        # NCCL ends the process of a broadcast that takes longer than its group's timeout: ours is
        # found before, and the group given up.
        patience_s = timeout_s + _NCCL_LATER_S
        meeting = _in_thread(make_group, store, name, world_size, backend, patience_s)
        _first_failure([*invitations, meeting], timeout_s, _JOIN)
        return cls(clients, name, meeting.result(), store, timeout_s)

    def open(self) -> None:
        """Begin the next update in the background: servers are idle while a step computes, and
        beginning costs as much as sending a small model. :meth:`publish` goes on from there."""
        if not self._broken and not self._opening:
            self._opening = self._ask(
                lambda client: client.begin_weight_update(timeout_s=self._timeout_s)
            )

    def _ask(self, call: Callable[[SglangClient], None]) -> list[concurrent.futures.Future[None]]:
        """The answers of all servers, in their order."""
        self._asked_at = time.monotonic()
        self._asked = [self._threads.submit(call, client) for client in self._clients]
        return self._asked

    def cancel(self) -> None:
        """End an update that was opened and is not needed."""
        if self._opening:
            with self._abandoned_if_it_fails():
                self._begun()
                self._end_on_all()

    def _begun(self) -> None:
        self.open()
        opening, self._opening = self._opening, []
        _first_failure(opening, self._timeout_s, "begin a weight update")

    def publish(self, buckets: Iterable[Bucket], policy_version: int) -> None:
        """Send a whole model, bucket by bucket, and name it ``policy_version``.

        Two buckets are held at a time: the servers take the new name with the last one, so which
        one is the last has to be known before it goes. Tensors are on this rank's device, in any
        dtype: the servers convert to theirs.

        Raises WeightSyncFailed; the group is then of no more use.
        """
        if self._broken:
            raise WeightSyncFailed("this weight group failed before; join a new one")
        sent = False
        with self._abandoned_if_it_fails():
            self._begun()
            for bucket, last in _marking_last(buckets):
                self._send(bucket, policy_version if last else None)
                sent = True
            self._end_on_all()
        assert sent, "no weights to publish"

    def _send(self, bucket: Bucket, policy_version: int | None) -> None:
        """Broadcast one bucket. ``None``: more are to come."""
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
        # Longer than it is waited for: one that hangs makes the others wait in the broadcast, and
        # what these answer when it is given up tells them from it.
        patience_s = self._timeout_s + _PARTING_S
        posts = self._ask(lambda client: client.receive_weights(body, timeout_s=patience_s))
        # In a thread too: without the servers it does not return, and one may have refused.
        sending = _in_thread(_broadcast, flat, self._group)
        _first_failure([*posts, sending], self._timeout_s, "receive weights")

    def _end_on_all(self) -> None:
        futures = self._ask(lambda client: client.end_weight_update(timeout_s=self._timeout_s))
        _first_failure(futures, self._timeout_s, "end a weight update")

    @contextlib.contextmanager
    def _abandoned_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except WeightSyncFailed as failed:
            failed.silent = self._abandon()
            raise
        except BaseException:
            self._abandon()
            raise

    def _abandon(self) -> dict[str, float]:
        """Hang up, so that servers that wait for a broadcast fail now and not at their timeout.
        Returns the servers that stay silent, which are told nothing more."""
        self._broken = True
        self._group.abort()
        silent = self._silent()
        parting = self._part([client for client in self._clients if client.url not in silent])
        concurrent.futures.wait(parting)
        return silent

    def _silent(self) -> dict[str, float]:
        """As :attr:`WeightSyncFailed.silent`."""
        deadline = time.monotonic() + _WORDS_S
        # A lone one that is late, all others having answered, is not waited for again.
        enough = int(time.monotonic() - self._asked_at >= self._timeout_s)
        pending = set(self._asked)
        while len(pending) > enough and time.monotonic() < deadline:
            _, pending = concurrent.futures.wait(
                pending, deadline - time.monotonic(), concurrent.futures.FIRST_COMPLETED
            )
        silence = time.monotonic() - self._asked_at
        asked = zip(self._clients, self._asked, strict=True)
        silent = {client.url: silence for client, answer in asked if not _answered(answer)}
        return silent if len(silent) < len(self._clients) else {}

    def _part(self, clients: Sequence[SglangClient]) -> list[concurrent.futures.Future[None]]:
        """Side by side: one that hangs keeps no other waiting."""

        def part(client: SglangClient) -> None:
            with contextlib.suppress(SglangError):  # a server that is gone has left
                with contextlib.suppress(RequestRefused):  # no update is open
                    client.end_weight_update(timeout_s=_PARTING_S)
                client.leave_weight_group(self.name, timeout_s=_PARTING_S)

        return [_in_thread(part, client) for client in clients]

    def close(self) -> None:
        """Leave the group; servers that still run leave it too."""
        if not self._broken:
            self._broken = True
            # All at once: a member of an NCCL group may wait for the others to leave as well.
            parting = self._part(self._clients)
            dist.destroy_process_group(self._group)
            concurrent.futures.wait(parting)
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


def _answered(call: concurrent.futures.Future[None]) -> bool:
    return call.done() and not isinstance(call.exception(), NoAnswer)


def _first_failure(
    futures: Sequence[concurrent.futures.Future[Any]], timeout_s: float, doing: str
) -> None:
    """Wait for all; where one fails, or after ``timeout_s``, raise WeightSyncFailed.

    Several fail together: a server refuses and hangs up. The earlier of ``futures`` is reported,
    which is a server's answer where there is one.
    """
    deadline = time.monotonic() + timeout_s
    done, pending = concurrent.futures.wait(
        futures, timeout_s, return_when=concurrent.futures.FIRST_EXCEPTION
    )
    if any(future.exception() for future in done):
        left_s = max(deadline - time.monotonic(), 0.0)
        concurrent.futures.wait(futures, min(_WORDS_S, left_s))
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
