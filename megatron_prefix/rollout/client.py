"""SGLang over HTTP, one call at a time. ``async_client.py`` has the one for many requests.

A request is tried again with exponential backoff where the server cannot be reached, drops the
connection or answers 5xx; one that would not be the same twice (a weight update) is sent once.
Errors are those of :mod:`megatron_prefix.rollout.protocol`.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import httpx

from megatron_prefix.rollout import protocol
from megatron_prefix.rollout.protocol import (
    Generation,
    RequestRefused,
    Sampling,
    ServerUnavailable,
    UnexpectedAnswer,
)

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Endpoint:
    """Where a server is and how patient its clients are."""

    url: str  # http://host:port, no path
    api_key: str = ""  # empty: the server asks for none
    timeout_s: float = 600.0  # of one answer
    retries: int = 4
    first_delay_s: float = 0.5  # before the first retry; doubled for each one after
    start: int = 0  # how often it was started again
    source: str = ""  # the file that its supervisor keeps; empty: nobody restarts it
    settings: str = "rollout"  # the section of the recipe that the others come from

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def delay_s(self, attempt: int) -> float:
        return self.first_delay_s * 2.0**attempt

    def request_url(self, path: str) -> str:
        return f"{self.url.rstrip('/')}{path}"


class SglangClient:
    """One server, one call at a time; threads may share it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        # No proxies from the environment: a server is on this machine or on the job's network.
        self._http = httpx.Client(
            headers=endpoint.headers(), limits=httpx.Limits(max_connections=None), trust_env=False
        )

    @property
    def url(self) -> str:
        return self.endpoint.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """One generation a prompt, in their order, from one batched request."""
        if not prompts:
            return []
        answer = self._request("POST", "/generate", protocol.generate_body(prompts, sampling))
        return protocol.parse_generations(answer, len(prompts), self.url)

    def model_info(self, *, timeout_s: float = 0.0, retries: int = -1) -> dict[str, Any]:
        """model_path, weight_version, model_type, ...; cheap: nothing is generated."""
        return self._dict("GET", "/model_info", None, timeout_s=timeout_s, retries=retries)

    def server_info(self, *, timeout_s: float = 0.0, retries: int = -1) -> dict[str, Any]:
        """The resolved settings (device, dtype, tp_size, ...) and the state of the scheduler."""
        return self._dict("GET", "/server_info", None, timeout_s=timeout_s, retries=retries)

    def healthy(self, timeout_s: float) -> bool:
        """Whether it generates a token, or works on one for somebody; takes it about 1 s."""
        try:
            return self._send("GET", "/health", None, timeout_s, 0)[0] == 200
        except ServerUnavailable:
            return False

    def abort(self, request_id: str = "") -> None:
        """Stop one request, or all of them; those stopped answer with what they have."""
        body = {"rid": request_id} if request_id else {"abort_all": True}
        self._request("POST", "/abort_request", body)

    def flush_cache(self, *, wait_s: float = 30.0) -> None:
        """Drop the prefix cache, which other weights may have filled, once the server is idle."""
        path = f"/flush_cache?timeout={wait_s:g}"
        status, words = self._send("POST", path, None, self.endpoint.timeout_s, 0)
        if status != 200:  # the words are plain ones, where the other calls answer JSON
            raise protocol.refusal(status, words, self.endpoint.request_url(path))

    def join_weight_group(
        self, *, address: str, port: int, rank: int, world_size: int, name: str, backend: str
    ) -> None:
        """Make the server a member of a weight group; returns when all members have met."""
        body = {
            "master_address": address,
            "master_port": port,
            "rank_offset": rank,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        self._command("/init_weights_update_group", body)

    def leave_weight_group(self, name: str, *, timeout_s: float = 0.0) -> None:
        path = "/destroy_weights_update_group"
        self._command(path, {"group_name": name}, timeout_s=timeout_s)

    def begin_weight_update(self, *, timeout_s: float = 0.0) -> None:
        """Open an update. One that a trainer left open when it died is closed first."""
        path, body = "/begin_weight_update", {"selector": "all"}
        try:
            self._command(path, body, timeout_s=timeout_s)
        except RequestRefused as refused:
            if "already open" not in str(refused):
                raise
            self.end_weight_update(timeout_s=timeout_s)
            self._command(path, body, timeout_s=timeout_s)

    def end_weight_update(self, *, timeout_s: float = 0.0) -> None:
        self._command("/end_weight_update", {}, timeout_s=timeout_s)

    def receive_weights(self, body: dict[str, Any], *, timeout_s: float) -> None:
        """Let the server take part in one broadcast of its weight group."""
        self._command("/update_weights_from_distributed", body, timeout_s=timeout_s)

    def load_weights(self, folder: str, *, policy_version: int) -> None:
        """Load a Hugging Face folder that the server can read, and call it ``policy_version``."""
        label = protocol.version_label(policy_version)
        body = {"model_path": folder, "weight_version": label, "flush_cache": True}
        self._command("/update_weights_from_disk", body)

    def weight_checksums(self, *, timeout_s: float = 0.0) -> dict[int, dict[str, str]]:
        """By tensor-parallel rank: the hash of every tensor, under the server's fused names."""
        path = "/weights_checker"
        answer = self._dict("POST", path, {"action": "checksum"}, timeout_s=timeout_s)
        try:
            return {
                rank["parallelism_info"][0]["tp_rank"]: dict(rank["checksums"])
                for rank in answer["ranks"]
            }
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise UnexpectedAnswer(
                f"{self.url}{path} answered no checksums: {protocol.shown(answer)}"
            ) from error

    def _command(self, path: str, body: dict[str, Any], *, timeout_s: float = 0.0) -> None:
        """A POST that is sent once and whose answer must say ``success``."""
        answer = self._dict("POST", path, body, timeout_s=timeout_s, retries=0)
        if answer.get("success") is not True:
            raise RequestRefused(f"{self.url}{path} did not succeed: {protocol.shown(answer)}")

    def _dict(self, method: str, path: str, body: Any, **limits: Any) -> dict[str, Any]:
        answer = self._request(method, path, body, **limits)
        if not isinstance(answer, dict):
            raise UnexpectedAnswer(
                f"{self.url}{path} answered {protocol.shown(answer)} instead of an object"
            )
        return answer

    def _request(
        self, method: str, path: str, body: Any, *, timeout_s: float = 0.0, retries: int = -1
    ) -> Any:
        """``timeout_s`` 0 and ``retries`` below 0: the endpoint's."""
        retries = self.endpoint.retries if retries < 0 else retries
        status, text = self._send(method, path, body, timeout_s or self.endpoint.timeout_s, retries)
        return protocol.read_answer(status, text, self.endpoint.request_url(path))

    def _send(
        self, method: str, path: str, body: Any, timeout_s: float, retries: int
    ) -> tuple[int, str]:
        """The status, below 500, and the body of the first attempt that gets so far."""
        url = self.endpoint.request_url(path)
        timeout = httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S), pool=None)
        failure = ""
        for attempt in range(retries + 1):
            try:
                answer = self._http.request(method, url, json=body, timeout=timeout)
            except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
                raise protocol.too_slow(url, timeout_s, self.endpoint.settings) from error
            except httpx.TransportError as error:
                failure = f"could not be reached: {type(error).__name__} {error}"
            else:
                if answer.status_code < 500:
                    return answer.status_code, answer.text
                failure = f"answered {answer.status_code}: {protocol.shown(answer.text)}"
            if attempt < retries:
                time.sleep(self.endpoint.delay_s(attempt))
        raise ServerUnavailable(f"{url} {failure} (after {retries + 1} attempts)")
