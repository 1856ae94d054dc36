"""Servers that score passages, asked from a thread of its own while this rank computes.

Each request goes to the server with the fewest under way. One that does not answer is lost, and
what it was asked goes to the others; where none is left, requests wait for one to be back, which
its supervisor starts again, or whoever keeps it.
"""

import asyncio
import concurrent.futures
import logging
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.async_client import AsyncGenerator
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.fleet import Fleet
from megatron_prefix.rollout.pool import all_or_none
from megatron_prefix.rollout.protocol import ServerUnavailable
from megatron_prefix.rollout.scoring import Passage, TopRows

logger = logging.getLogger(__name__)
_PASSAGES = 16  # of one request
_IN_FLIGHT = 4  # requests that a server has at a time; it batches them by itself
_LOOK_S = 0.5  # between two looks for a server that is to come back


class Scorer:
    """``servers`` are their settings in a ``RolloutConfig``'s words; ``name`` is the recipe's."""

    def __init__(
        self, endpoints: Sequence[Endpoint], servers: RolloutConfig, top_k: int, name: str
    ) -> None:
        self._servers, self._top_k, self._name = servers, top_k, name
        self._fleet = Fleet(endpoints, servers)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="scorer", daemon=True)
        self._thread.start()
        self._generators = self._run(self._open(endpoints)).result()
        self._load = {endpoint.url: 0 for endpoint in endpoints}
        self._looking = asyncio.Lock()
        self._background: asyncio.Task[None] | None = None
        self._room = asyncio.Semaphore(_IN_FLIGHT * len(endpoints))  # first come, first served

    def close(self) -> None:
        """What was not taken is dropped."""
        self._run(self._close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._fleet.close()

    def meet(self) -> Sequence[str]:
        """The servers that answer, once all do or ``start_timeout_s`` is over; ServerUnavailable
        where none does."""
        self._fleet.meet()
        return self._fleet.usable()

    def submit(self, passages: Sequence[Passage]) -> "concurrent.futures.Future[list[TopRows]]":
        """Their scores, in order; what was submitted first is asked first.

        The future raises ServerUnavailable where no server answered for ``start_timeout_s``,
        UnexpectedAnswer or RequestRefused at once: a model is not well by asking again.
        """
        return self._run(self._score(list(passages)))

    def _run[T](self, work: Coroutine[Any, Any, T]) -> "concurrent.futures.Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _open(self, endpoints: Sequence[Endpoint]) -> dict[str, AsyncGenerator]:
        return {endpoint.url: AsyncGenerator(endpoint) for endpoint in endpoints}

    async def _close(self) -> None:
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for generator in self._generators.values():
            await generator.close()

    async def _score(self, passages: list[Passage]) -> list[TopRows]:
        parts = [passages[at : at + _PASSAGES] for at in range(0, len(passages), _PASSAGES)]
        tasks = [asyncio.create_task(self._ask(part)) for part in parts]
        if len(self._fleet.usable()) < len(self._load) and not self._looking.locked():
            self._background = asyncio.create_task(self._look())  # the others serve meanwhile
        return [rows for answer in await all_or_none(tasks) for rows in answer]

    async def _ask(self, passages: Sequence[Passage]) -> list[TopRows]:
        async with self._room:
            while True:
                url = await self._choose()
                self._load[url] += 1
                try:
                    return await self._generators[url].score(passages, self._top_k)
                except ServerUnavailable as error:
                    self._fleet.lose(url, error)
                finally:
                    self._load[url] -= 1

    async def _choose(self) -> str:
        """Of the servers that may be asked, the one with the fewest requests."""
        deadline = time.monotonic() + self._servers.start_timeout_s
        while not (usable := self._fleet.usable()):
            if time.monotonic() > deadline:
                raise self._none_left("; ".join(self._fleet.losses()))
            self._fleet.expect()
            await self._look()
            await asyncio.sleep(_LOOK_S)
        return min(usable, key=lambda url: self._load[url])

    async def _look(self) -> None:
        """For lost servers that are back."""
        async with self._looking:
            await asyncio.to_thread(self._fleet.in_step, 0)

    def _none_left(self, why: str) -> ServerUnavailable:
        return ServerUnavailable(
            f"no server of {self._name} answered for {self._name}.start_timeout_s="
            f"{self._servers.start_timeout_s:g}: {why}"
        )
