"""``/generate`` and ``/abort_request`` of one server, for hundreds of requests at a time.

With aiohttp: httpx's asynchronous client takes 1.5 to 3.5 ms of processor time a request,
aiohttp 0.15 ms, and an over-sampled step has a request a rollout.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from megatron_prefix.rollout import protocol
from megatron_prefix.rollout.client import CONNECT_TIMEOUT_S, Endpoint
from megatron_prefix.rollout.protocol import Generation, Sampling, ServerUnavailable

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
        sampling: Sampling,
        request_ids: Callable[[], Sequence[str]] = tuple,
    ) -> list[Generation]:
        """As ``SglangClient.generate``. ``request_ids`` is asked for each attempt: the server may
        still know those of the last one."""
        answer = await self._post(
            "/generate", lambda: protocol.generate_body(prompts, sampling, request_ids())
        )
        return protocol.parse_generations(answer, len(prompts), self.endpoint.url)

    async def abort(self, request_id: str) -> None:
        """Stop one request, which then answers with what it has; an unknown id is ignored."""
        await self._post("/abort_request", lambda: {"rid": request_id})

    async def _post(self, path: str, body: Callable[[], dict[str, Any]]) -> Any:
        url, retries = self.endpoint.request_url(path), self.endpoint.retries
        failure = ""
        for attempt in range(retries + 1):
            try:
                async with self._session.post(url, json=body()) as answer:
                    text = await answer.text()
            except aiohttp.SocketTimeoutError as error:
                raise protocol.too_slow(url, self.endpoint.timeout_s) from error
            except aiohttp.ClientError as error:
                failure = f"could not be reached: {type(error).__name__} {error}"
            else:
                if answer.status < 500:
                    return protocol.read_answer(answer.status, text, url)
                failure = f"answered {answer.status}: {protocol.shown(text)}"
            if attempt < retries:
                await asyncio.sleep(self.endpoint.delay_s(attempt))
        raise ServerUnavailable(f"{url} {failure} (after {retries + 1} attempts)")
