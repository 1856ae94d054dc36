"""What a teacher behind a real SGLang server sends for a token: what ``teacher_transport.py`` needs
one for. Milliseconds hold the server's forward as well as the way and the parsing."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import torch

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.scoring import Passage, parse_scores, score_body
from megatron_prefix.rollout.server import server_pool
from megatron_prefix.tasks import sort_chain

NAME = "SORT-CHAIN teacher"
PREFIX = 16  # scored tokens of a passage, behind a prompt of PROMPT
PROMPT = 14
# A request's body and what is made of the answer.
Exchange = tuple[dict[str, Any], Callable[[str], object]]


def exchanges(passages: list[Passage], top_k: int, url: str) -> Iterator[tuple[str, Exchange]]:
    """Top k as the trainer asks for it, as SGLang has it without, and hidden states."""
    flat = score_body(passages, top_k)
    plain = {key: value for key, value in flat.items() if "flat" not in key}
    hidden = {
        "input_ids": flat["input_ids"],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},  # with 0 there are none
        "return_hidden_states": True,
    }
    yield (
        f"top {top_k}, base64",
        (flat, lambda t: parse_scores(json.loads(t), passages, top_k, url)),
    )
    yield f"top {top_k}, JSON", (plain, json.loads)
    yield "hidden states, JSON", (hidden, json.loads)


def measure(positions: int, repeats: int, top_k: int) -> list[tuple[str, float, float]]:
    """(kind, bytes a scored token, milliseconds a microbatch of ``positions``)."""
    settings = RolloutConfig(device="cpu", server_args=("--return-hidden-states-mode", "full"))
    folder = sort_chain.model_folder("teacher")
    with (
        tempfile.TemporaryDirectory() as logs,
        server_pool(folder, settings, params_dtype="fp32", log_folder=logs) as servers,
    ):
        return _measure(servers[0].endpoint, positions, repeats, top_k)


def _measure(
    endpoint: Endpoint, positions: int, repeats: int, top_k: int
) -> list[tuple[str, float, float]]:
    sizes: dict[str, int] = {}
    seconds: dict[str, list[float]] = {}
    with httpx.Client(headers=endpoint.headers(), timeout=120.0, trust_env=False) as client:
        for repeat in range(repeats + 1):  # the first warms up
            passages = _passages(positions // PREFIX, repeat)  # new ones: nothing of them is cached
            for kind, (body, parse) in exchanges(passages, top_k, endpoint.url):
                client.post(f"{endpoint.url}/flush_cache").raise_for_status()
                start = time.perf_counter()
                answer = client.post(f"{endpoint.url}/generate", json=body).raise_for_status()
                parse(answer.text)
                sizes[kind] = len(answer.content)
                if repeat:
                    seconds.setdefault(kind, []).append(time.perf_counter() - start)
    scored = positions // PREFIX * PREFIX
    return [
        (kind, size / scored, 1e3 * statistics.median(seconds[kind]))
        for kind, size in sizes.items()
    ]


def _passages(count: int, seed: int) -> list[Passage]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 46, (count, PROMPT + PREFIX), generator=draw).tolist()
    return [Passage(tuple(row), PROMPT) for row in ids]
