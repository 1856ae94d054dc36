"""``/generate`` and ``/abort_request`` of one server, for hundreds of requests at a time.

With aiohttp: httpx's asynchronous client takes 1.5 to 3.5 ms of processor time a request,
aiohttp 0.15 ms, and an over-sampled step has a request a rollout.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp

from megatron_prefix.prefix import CutOffRule
from megatron_prefix.rollout import protocol, scoring
from megatron_prefix.rollout.client import CONNECT_TIMEOUT_S, Endpoint
from megatron_prefix.rollout.protocol import Generation, Sampling, ServerUnavailable
from megatron_prefix.rollout.scoring import Passage, TopRows
from megatron_prefix.rollout.streaming import EventReader, StreamedGeneration

# Below the 5 s after which SGLang hangs up on an idle connection: between two steps no event loop
# runs that would notice.
_KEEP_ALIVE_S = 2.0


class AsyncGenerator:
    """One server. To be made and closed inside the event loop that uses it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        connect = min(CONNECT_TIMEOUT_S, endpoint.timeout_s)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            headers=endpoint.headers(),
            timeout=aiohttp.ClientTimeout(sock_connect=connect, sock_read=endpoint.timeout_s),
        )

    async def close(self) -> None:
        await self._session.close()

    async def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        request_ids: Callable[[], Sequence[str]] = tuple,
    ) -> list[Generation]:
        """As ``SglangClient.generate``, with one ``sampling`` for all or one for each prompt.
        ``request_ids`` is asked for each attempt: the server may
        still know those of the last one."""
        answer = await self._post(
            "/generate", lambda: protocol.generate_body(prompts, sampling, request_ids())
        )
        return protocol.parse_generations(answer, len(prompts), self.endpoint.url)

    async def stream(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        rule: CutOffRule,
        request_id: Callable[[], str],
    ) -> Generation:
        """One generation that ``rule`` may cut: the server is told to end it there.

        ``request_id`` is asked for each attempt, of which each begins anew. Raises as
        ``SglangClient.generate``.
        """
        url, name = self.endpoint.request_url("/generate"), ""

        def body() -> dict[str, Any]:
            nonlocal name
            name = request_id()
            return protocol.stream_body(
                prompt, sampling, name, top_k=rule.top_k, every=rule.check_every
            )

        async def read(answer: aiohttp.ClientResponse) -> Generation:
            events, seen, told = EventReader(url), StreamedGeneration(rule.start(), url), False
            async for data in answer.content.iter_any():
                for event in events.feed(data):
                    seen.add(event)
                if seen.cut and not told:
                    # The stream is read on: its end says what the server has sampled.
                    told = True
                    await self.abort(name)
            return seen.result()

        return await self._post("/generate", body, read)

    async def score(self, passages: Sequence[Passage], top_k: int) -> list[TopRows]:
        """The ``top_k`` likeliest tokens at each passage's scored positions, in their order.

        Raises UnexpectedAnswer where an answer is not that, else as ``SglangClient.generate``.
        """
        answer = await self._post("/generate", lambda: scoring.score_body(passages, top_k))
        return scoring.parse_scores(answer, passages, top_k, self.endpoint.url)

    async def abort(self, request_id: str) -> None:
        """Stop one request, which then answers with what it has; an unknown id is ignored."""
        await self._post("/abort_request", lambda: {"rid": request_id})

    async def healthy(self, timeout_s: float) -> bool:
        """Whether it generates a token, or works on one for somebody, within ``timeout_s``."""
        url = self.endpoint.request_url("/health")
        try:
            async with asyncio.timeout(timeout_s), self._session.get(url) as answer:
                return answer.status == 200
        except (TimeoutError, aiohttp.ClientError):
            return False

    async def _post(
        self,
        path: str,
        body: Callable[[], dict[str, Any]],
        read: Callable[[aiohttp.ClientResponse], Awaitable[Any]] | None = None,
    ) -> Any:
        """What ``read`` makes of an answer below 400; without it, the answer's JSON."""
        url, retries = self.endpoint.request_url(path), self.endpoint.retries
        failure = ""
        for attempt in range(retries + 1):
            try:
                async with self._session.post(url, json=body()) as answer:
                    if read is not None and answer.status < 400:
                        return await read(answer)
                    text = await answer.text()
            except aiohttp.SocketTimeoutError as error:
                asked = self.endpoint
                raise protocol.too_slow(url, asked.timeout_s, asked.settings) from error
            except aiohttp.ClientError as error:
                failure = f"could not be reached: {type(error).__name__} {error}"
                if self.endpoint.source and isinstance(error, aiohttp.ClientConnectorError):
                    retries = attempt  # it is being restarted, which takes longer than we would
            else:
                if answer.status < 500:
                    return protocol.read_answer(answer.status, text, url)
                failure = f"answered {answer.status}: {protocol.shown(text)}"
            if attempt >= retries:
                break
            await asyncio.sleep(self.endpoint.delay_s(attempt))
        raise ServerUnavailable(f"{url} {failure} (after {retries + 1} attempts)")
