"""Requests over several servers: what one of them does not answer, or answers wrongly, is asked of
the others. Each prompt ends with one generation, whoever gave it: what a server that was given up
still sends is not listened to."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from typing import Protocol

from megatron_prefix.rollout.async_client import AsyncGenerator
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.protocol import (
    Generation,
    OtherWeights,
    ServerUnavailable,
    SglangError,
    UnexpectedAnswer,
)

logger = logging.getLogger(__name__)
# Faults of one server, that another may not have. A refusal (4xx) is none: all would refuse.
FAULTS = (ServerUnavailable, UnexpectedAnswer)
_LOOKS = 4  # health checks within the time after which a server counts as hanging
_TELL_S = 1.0  # between two words to the roster that answers are out
# Has a server answer jobs, one generation each.
type Ask[T] = Callable[[AsyncGenerator, Sequence[T]], Coroutine[None, None, list[Generation]]]


class Roster(Protocol):
    """Which servers may be asked, by their URLs. ``fleet.py`` has the one of a run."""

    def usable(self) -> Sequence[str]: ...

    def version(self, url: str) -> int:
        """The policy version that it is known to hold; -1 where nobody looked."""

    def lose(self, url: str, why: SglangError) -> None:
        """Ask it no more until it is well again."""

    def waiting(self) -> None:
        """Called again and again while answers are out: that comes to an end by the servers' own
        timeouts."""


class Everyone:
    """The roster of whoever neither restarts servers nor publishes weights: a server that failed
    is left out until all have."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._urls = [endpoint.url for endpoint in endpoints]
        self._lost: set[str] = set()

    def usable(self) -> Sequence[str]:
        if self._lost >= set(self._urls):
            self._lost.clear()
        return [url for url in self._urls if url not in self._lost]

    def version(self, url: str) -> int:
        return -1

    def lose(self, url: str, why: SglangError) -> None:
        self._lost.add(url)

    def waiting(self) -> None:
        """Nobody has to know."""


class Pool:
    """All servers of a collector. To be made and closed inside the event loop that uses it."""

    def __init__(
        self, endpoints: Sequence[Endpoint], roster: Roster, hang_timeout_s: float
    ) -> None:
        self._servers = [AsyncGenerator(endpoint) for endpoint in endpoints]
        self._roster, self._hang_timeout_s = roster, hang_timeout_s
        self._hung = [asyncio.Event() for _ in endpoints]
        self._newest = -1

    async def close(self) -> None:
        for server in self._servers:
            await server.close()

    def usable(self) -> list[AsyncGenerator]:
        """Raises ServerUnavailable where no server may be asked."""
        urls = set(self._roster.usable())
        servers = [server for server in self._servers if server.endpoint.url in urls]
        if not servers:
            raise ServerUnavailable("no SGLang server is left to ask")
        return servers

    @contextlib.asynccontextmanager
    async def watching(self, policy_version: int) -> AsyncIterator[None]:
        """While requests run: finds servers that hang. ``policy_version`` is the trainer's."""
        self._newest = policy_version
        watchers = [asyncio.create_task(self._watch(place)) for place in range(len(self._servers))]
        watchers.append(asyncio.create_task(self._tell()))
        try:
            yield
        finally:
            await cancel(watchers)

    async def _tell(self) -> None:
        """Not while something keeps the event loop from going on, as a rule of the user's may."""
        while True:
            await asyncio.sleep(_TELL_S)
            self._roster.waiting()

    async def _watch(self, place: int) -> None:
        server, hung = self._servers[place], self._hung[place]
        hung.clear()
        loop = asyncio.get_running_loop()
        pause = self._hang_timeout_s / _LOOKS
        well_at = loop.time()
        while not hung.is_set():
            await asyncio.sleep(pause)
            if await server.healthy(pause):
                well_at = loop.time()
            elif loop.time() - well_at >= self._hang_timeout_s:
                hung.set()

    async def generate[T](
        self,
        server: AsyncGenerator,
        jobs: Sequence[T],
        ask: Ask[T],
        tried: frozenset[str] = frozenset(),
    ) -> list[Generation]:
        """One generation a job: what ``ask`` has of ``server`` or, where it fails, of others.

        Raises the last server's error where none is left, RequestRefused at once.
        """
        try:
            return await self._ask(server, jobs, ask)
        except FAULTS as error:
            self._roster.lose(server.endpoint.url, error)
            tried |= {server.endpoint.url}
            usable = set(self._roster.usable()) - tried
            others = [other for other in self._servers if other.endpoint.url in usable]
            if not others:
                raise
            logger.warning(
                "%d requests go to %d other server(s): %s", len(jobs), len(others), error
            )
        tasks = [
            asyncio.create_task(self.generate(other, share, ask, tried))
            for other, share in _shares(others, jobs)
        ]
        return [generation for answer in await all_or_none(tasks) for generation in answer]

    async def _ask[T](
        self, server: AsyncGenerator, jobs: Sequence[T], ask: Ask[T]
    ) -> list[Generation]:
        url = server.endpoint.url
        known = self._roster.version(url)
        asking = asyncio.create_task(ask(server, jobs))
        hanging = asyncio.create_task(self._hung[self._servers.index(server)].wait())
        try:
            await asyncio.wait([asking, hanging], return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise ServerUnavailable(
                    f"{url} passed no health check for rollout.hang_timeout_s="
                    f"{self._hang_timeout_s:g} while it had requests"
                )
            answers = asking.result()
        finally:
            await cancel([asking, hanging])
        self._check_versions(url, answers, known)
        return answers

    def _check_versions(self, url: str, answers: Sequence[Generation], known: int) -> None:
        for generation in answers:
            if generation.policy_version > self._newest:
                raise OtherWeights(
                    f"{url} sampled with policy version {generation.policy_version}, newer than "
                    f"the trainer's {self._newest}: publish the trainer's weights first"
                )
            if generation.policy_version < known:
                raise OtherWeights(
                    f"{url} sampled with policy version {generation.policy_version}, though it had "
                    f"been given {known}"
                )


def _shares[T](
    servers: Sequence[AsyncGenerator], jobs: Sequence[T]
) -> Iterator[tuple[AsyncGenerator, Sequence[T]]]:
    """The jobs over the servers, in order, as evenly as can be; none gets an empty share."""
    count = len(servers)
    for place, server in enumerate(servers):
        share = jobs[place * len(jobs) // count : (place + 1) * len(jobs) // count]
        if share:
            yield server, share


async def all_or_none[T](tasks: Sequence[asyncio.Task[T]]) -> list[T]:
    """All results in order; where one fails, the others are cancelled and its error raised."""
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        await cancel(tasks)
        raise


async def cancel[T](tasks: Sequence[asyncio.Task[T]]) -> None:
    """A server aborts the request of a client that hangs up."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
