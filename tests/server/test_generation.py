"""What a real server samples, against ``transformers`` on the same checkpoint."""

import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from transformers import PreTrainedModel

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.collector import Collector
from megatron_prefix.rollout.discarded import Discarded
from megatron_prefix.rollout.protocol import (
    Generation,
    RequestRefused,
    Sampling,
    UnexpectedAnswer,
    generate_body,
)
from megatron_prefix.rollout.server import Server
from megatron_prefix.types import Prompt
from tests.server.conftest import VOCABULARY
from tests.tiny_models import EOS_TOKEN_ID

NEWEST = 10**6  # a trainer's policy version that no server is ahead of
PROMPTS = [
    [7],
    [5, 6, 7, 8],
    [11] * 40,
    list(range(3, VOCABULARY)),
    [(7 * i) % 97 + 3 for i in range(300)],
]


def logprobs(model: PreTrainedModel, prompt: list[int], sampled: tuple[int, ...]) -> torch.Tensor:
    """Log-probabilities [L, V] of every token at each sampled position, at temperature 1."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *sampled]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def of_sampled(model: PreTrainedModel, prompt: list[int], generation: Generation) -> torch.Tensor:
    """The sampled tokens' entries of :func:`logprobs`, [L]."""
    chosen = torch.tensor(generation.token_ids)[:, None]
    return logprobs(model, prompt, generation.token_ids).gather(1, chosen)[:, 0]


@pytest.fixture(scope="module")
def greedy(client: SglangClient) -> list[Generation]:
    return client.generate(PROMPTS, Sampling(24, temperature=0.0))


def test_greedy_tokens_equal_transformers(
    greedy: list[Generation], reference: PreTrainedModel
) -> None:
    for prompt, generation in zip(PROMPTS, greedy, strict=True):
        best = logprobs(reference, prompt, generation.token_ids).argmax(-1)
        assert generation.token_ids == tuple(best.tolist())


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_logprobs_are_the_policys_own_at_any_temperature(
    client: SglangClient, reference: PreTrainedModel, temperature: float
) -> None:
    generations = client.generate(PROMPTS, Sampling(24, temperature=temperature))
    for prompt, generation in zip(PROMPTS, generations, strict=True):
        expected = of_sampled(reference, prompt, generation)
        torch.testing.assert_close(torch.tensor(generation.logprobs), expected, rtol=0, atol=1e-4)


def uncut(generations: list[Generation]) -> int:
    """The place of one that did not run into the checkpoint's own end token."""
    return [generation.finish_reason for generation in generations].index("length")


def test_cut_at_the_prefix_length(greedy: list[Generation]) -> None:
    for generation in greedy:
        ended = EOS_TOKEN_ID in generation.token_ids
        assert generation.finish_reason == ("stop" if ended else "length")
        assert len(generation.token_ids) == 24 or generation.token_ids[-1] == EOS_TOKEN_ID
    assert len(greedy[uncut(greedy)].token_ids) == 24


def test_stops_at_a_stop_token_and_returns_it(
    client: SglangClient, greedy: list[Generation]
) -> None:
    place = uncut(greedy)
    prompt, tokens = PROMPTS[place], greedy[place].token_ids
    end = tokens[5]
    sampling = Sampling(24, temperature=0.0, stop_token_ids=(end,))
    (stopped,) = client.generate([prompt], sampling)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == tokens[: tokens.index(end) + 1]


def test_one_token_is_a_prefix_too(client: SglangClient, greedy: list[Generation]) -> None:
    answers = client.generate(PROMPTS, Sampling(1, temperature=0.0))
    assert [answer.token_ids for answer in answers] == [g.token_ids[:1] for g in greedy]


def test_no_prompts_no_request(client: SglangClient) -> None:
    assert client.generate([], Sampling(1)) == []


def test_no_tokens_is_refused_before_the_server_is_asked() -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens=0 must be at least 1"):
        Sampling(0)


def cached_tokens(client: SglangClient) -> int:
    """Prompt tokens that one more generation finds in the cache."""
    body = generate_body(PROMPTS[-1:], Sampling(1))
    headers = client.endpoint.headers()
    answer = httpx.post(client.endpoint.request_url("/generate"), json=body, headers=headers)
    return answer.json()[0]["meta_info"]["cached_tokens"]


def test_the_cache_is_flushed_on_demand(client: SglangClient) -> None:
    cached_tokens(client)
    assert cached_tokens(client) > 0
    client.flush_cache()
    assert cached_tokens(client) == 0


def test_the_servers_words_reach_the_user(client: SglangClient) -> None:
    with pytest.raises(RequestRefused, match=r"/generate refused the request with 400: .*2048"):
        client.generate([[5] * 3000], Sampling(4))


def test_rollouts_come_by_prompt_and_sample(
    server: Server, client: SglangClient, greedy: list[Generation]
) -> None:
    config = RolloutConfig(samples_per_prompt=2, temperature=0.0)
    prompts = [Prompt(10 + place, place, tuple(ids)) for place, ids in enumerate(PROMPTS)]
    with Collector([server.endpoint] * 2, config, stop_token_ids=()) as collector:
        collected = collector.collect(prompts, max_new_tokens=24, policy_version=NEWEST)
    version = int(client.model_info()["weight_version"].removeprefix("v"))
    for place, rollout in enumerate(collected):
        prompt = prompts[place // 2]
        assert rollout.prompt_index == prompt.index
        assert rollout.prompt_ids == prompt.input_ids
        assert rollout.prefix_ids == greedy[place // 2].token_ids
        assert rollout.policy_version == version
        assert len(rollout.rollout_logprobs) == len(rollout.prefix_ids)
    assert len(collected) == 10


def test_weights_newer_than_the_trainers_are_an_error(server: Server) -> None:
    with (
        Collector([server.endpoint], RolloutConfig(), stop_token_ids=()) as collector,
        pytest.raises(UnexpectedAnswer, match=r"newer than the trainer's -1: publish"),
    ):
        collector.collect([Prompt(0, 0, (5, 6))], max_new_tokens=2, policy_version=-1)


@pytest.fixture(scope="module")
def race(client: SglangClient) -> tuple[list[Prompt], tuple[int, ...]]:
    """Prompts and a stop token with which, greedily, the first half of the prompts is still at
    work at 64 tokens while the second half has stopped."""
    candidates = [[3 + place, 50, 4 + place] for place in range(90)]
    generations = client.generate(candidates, Sampling(64, temperature=0.0))
    answers = list(zip(candidates, generations, strict=True))
    for end in range(VOCABULARY):
        slow = [ids for ids, g in answers if end not in g.token_ids and g.finish_reason == "length"]
        fast = [ids for ids, g in answers if end in g.token_ids[:8]]
        if len(slow) >= 4 and len(fast) >= 4:
            chosen = [*slow[:4], *fast[:4]]
            return [Prompt(i, i, tuple(ids)) for i, ids in enumerate(chosen)], (end,)
    raise AssertionError("no token parts these prompts")


def test_stragglers_are_aborted_at_the_quorum(
    server: Server, race: tuple[list[Prompt], tuple[int, ...]]
) -> None:
    prompts, stop = race
    config, discarded = RolloutConfig(temperature=0.0, over_sample=2.0), Discarded()
    with Collector([server.endpoint], config, stop, discarded=discarded) as collector:
        collected = collector.collect(prompts, max_new_tokens=1500, policy_version=NEWEST, wanted=4)
    assert [rollout.prompt_index for rollout in collected] == [4, 5, 6, 7]
    assert {rollout.finish_reason for rollout in collected} == {"stop"}
    thrown_away = discarded.take()
    assert [prompt for prompt, _ in thrown_away] == [3] * 4
    assert all(0 < tokens < 1500 for _, tokens in thrown_away)


def test_abort_ends_running_generations(
    client: SglangClient, race: tuple[list[Prompt], tuple[int, ...]]
) -> None:
    """The answers hold what was sampled until then."""
    prompts, stop = race
    slow = [prompt.input_ids for prompt in prompts[:4]]
    sampling = Sampling(1500, temperature=0.0, stop_token_ids=stop)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(client.generate, slow, sampling)
        while not running.done():
            time.sleep(0.2)
            client.abort()
    assert {generation.finish_reason for generation in running.result()} == {"abort"}
    assert all(len(generation.token_ids) < 1500 for generation in running.result())


def test_long_enough_stragglers_are_kept(
    server: Server, race: tuple[list[Prompt], tuple[int, ...]], reference: PreTrainedModel
) -> None:
    prompts, stop = race
    config = RolloutConfig(temperature=0.0, over_sample=2.0, keep_aborted_above=1 / 1500)
    surplus = Discarded()
    with Collector([server.endpoint], config, stop, discarded=surplus) as collector:
        collected = collector.collect(prompts, max_new_tokens=1500, policy_version=NEWEST, wanted=4)
    assert [rollout.prompt_index for rollout in collected] == [0, 1, 2, 3]
    for rollout in collected:
        assert rollout.finish_reason == "abort"
        assert 1 <= len(rollout.prefix_ids) == len(rollout.rollout_logprobs) < 1500
        best = logprobs(reference, list(rollout.prompt_ids), rollout.prefix_ids).argmax(-1)
        assert rollout.prefix_ids == tuple(best.tolist())
    assert len(surplus.take()) == 4


def test_rollouts_that_never_left_the_queue_are_dropped(
    server: Server, race: tuple[list[Prompt], tuple[int, ...]]
) -> None:
    """Eight run at a time here: the others are aborted without a token."""
    prompts = [Prompt(i, i, (5 + i, 6)) for i in range(24)]
    config = RolloutConfig(over_sample=3.0)
    with Collector([server.endpoint], config, stop_token_ids=()) as collector:
        collected = collector.collect(prompts, max_new_tokens=100, policy_version=NEWEST, wanted=8)
    assert len(collected) == 8
    assert all(rollout.finish_reason != "abort" and rollout.prefix_ids for rollout in collected)
