"""Cut-offs on a real server: what it really samples, and that a cut prefix is the policy's own."""

import statistics
from collections.abc import Callable, Sequence

import httpx
import pytest
import torch
from transformers import PreTrainedModel

from megatron_prefix.config import CutOffConfig, RolloutConfig
from megatron_prefix.prefix import SampledToken, build_cut_off
from megatron_prefix.prefix.cutoff import entropy_bound
from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.collector import Collector
from megatron_prefix.rollout.discarded import Discarded
from megatron_prefix.rollout.protocol import Generation, Sampling
from megatron_prefix.rollout.server import Server
from megatron_prefix.types import Prompt, Rollout
from tests.cut_offs import cut_length
from tests.server.conftest import VOCABULARY

LENGTH = 300
NEWEST = 10**6
PROMPTS = [Prompt(i, i, (5 + i, 6, 7)) for i in range(6)]
SETTINGS = CutOffConfig("surprisal", window=8, min_tokens=10, check_every=4)
GREEDY = RolloutConfig(temperature=0.0)


@pytest.fixture(scope="module")
def whole(client: SglangClient) -> list[Generation]:
    """Uncut, greedily: what a cut rollout must be the beginning of."""
    prompts = [prompt.input_ids for prompt in PROMPTS]
    return client.generate(prompts, Sampling(LENGTH, temperature=0.0))


@pytest.fixture(scope="module")
def settled(whole: list[Generation]) -> CutOffConfig:
    """A threshold that half of the rollouts' windows are under."""
    means = [
        statistics.fmean(-logprob for logprob in generation.logprobs[end - 8 : end])
        for generation in whole
        for end in range(40, len(generation.logprobs))
    ]
    return CutOffConfig(**{**vars(SETTINGS), "threshold": statistics.median(means)})


@pytest.fixture(scope="module")
def sampled(client: SglangClient) -> Callable[[], int]:
    """Tokens that the server has sampled so far, by its own count."""

    def count() -> int:
        text = httpx.get(client.endpoint.request_url("/metrics")).text
        name = "sglang:generation_tokens_total"
        return round(
            sum(float(line.split()[-1]) for line in text.splitlines() if name + "{" in line)
        )

    return count


def collect(server: Server, config: CutOffConfig) -> list[Rollout]:
    rule = build_cut_off(config, VOCABULARY)
    with Collector([server.endpoint], GREEDY, (), rule) as collector:
        return collector.collect(PROMPTS, max_new_tokens=LENGTH, policy_version=NEWEST)


def test_a_cut_off_really_shortens_what_the_server_samples(
    server: Server,
    whole: list[Generation],
    settled: CutOffConfig,
    sampled: Callable[[], int],
) -> None:
    before = sampled()
    collected = collect(server, settled)
    spent = sampled() - before
    rule = build_cut_off(settled, VOCABULARY)
    assert rule is not None
    kept = [
        cut_length(rule.start(), [SampledToken(logprob) for logprob in one.logprobs])
        for one in whole
    ]
    assert [len(rollout.prefix_ids) for rollout in collected] == kept
    for rollout, one, count in zip(collected, whole, kept, strict=True):
        assert rollout.prefix_ids == one.token_ids[:count]
        assert rollout.finish_reason == ("cut" if count < len(one.token_ids) else one.finish_reason)
    assert any(rollout.finish_reason == "cut" for rollout in collected)
    uncut = sum(len(one.token_ids) for one in whole)
    assert sum(kept) <= spent < 0.75 * uncut
    assert spent == sum(len(r.prefix_ids) + r.discarded for r in collected)


def test_the_entropy_rule_knows_the_entropy_from_above(
    server: Server, reference: PreTrainedModel, whole: list[Generation]
) -> None:
    """With k = V the server tells all, and the cut is where the exact entropies say so."""
    logits = [
        reference(torch.tensor([[*prompt.input_ids, *one.token_ids]])).logits[0].detach()
        for prompt, one in zip(PROMPTS, whole, strict=True)
    ]
    all_logprobs = [
        each[len(prompt.input_ids) - 1 : -1].log_softmax(-1)
        for prompt, each in zip(PROMPTS, logits, strict=True)
    ]
    entropies = [-(each.exp() * each).sum(-1) for each in all_logprobs]
    means = torch.cat([entropy.unfold(0, 8, 1).mean(-1)[40:] for entropy in entropies])
    config = CutOffConfig("entropy", float(means.median()), 8, 10, VOCABULARY, 4)
    collected = collect(server, config)
    for rollout, entropy, logprobs in zip(collected, entropies, all_logprobs, strict=True):
        moving = entropy.unfold(0, 8, 1).mean(-1)  # of tokens i to i + 7
        place = len(rollout.prefix_ids) - 8
        if rollout.finish_reason == "cut":
            assert moving[place] <= config.threshold + 1e-4
        assert (moving[2:place] > config.threshold - 1e-4).all()
        few = SampledToken(0.0, tuple(logprobs[0].sort(descending=True)[0][:20].tolist()))
        assert entropy_bound(few, VOCABULARY) >= float(entropy[0]) - 1e-5
    assert any(rollout.finish_reason == "cut" for rollout in collected)


def test_a_prompts_own_cap_is_met_exactly_and_told_as_a_cut(
    server: Server, whole: list[Generation], sampled: Callable[[], int]
) -> None:
    caps = [5, LENGTH, 40, 1, LENGTH, 17]

    def cap(prompt_ids: Sequence[int], length: int) -> int:
        assert length == LENGTH
        return caps[[prompt.input_ids for prompt in PROMPTS].index(tuple(prompt_ids))]

    before = sampled()
    with Collector([server.endpoint], GREEDY, ()) as collector:
        collected = collector.collect(
            PROMPTS, max_new_tokens=LENGTH, policy_version=NEWEST, cap=cap
        )
    for rollout, one, most in zip(collected, whole, caps, strict=True):
        assert rollout.prefix_ids == one.token_ids[:most]
        cut = most < len(one.token_ids)
        assert rollout.finish_reason == ("cut" if cut else one.finish_reason)
    assert sum(rollout.finish_reason == "cut" for rollout in collected) == 4
    assert sampled() - before == sum(len(rollout.prefix_ids) for rollout in collected)


def test_stragglers_and_cuts_go_together(server: Server, settled: CutOffConfig) -> None:
    rule = build_cut_off(settled, VOCABULARY)
    config, discarded = RolloutConfig(temperature=0.0, over_sample=2.0), Discarded()
    with Collector([server.endpoint], config, (), rule, discarded=discarded) as collector:
        collected = collector.collect(
            PROMPTS, max_new_tokens=LENGTH, policy_version=NEWEST, wanted=3
        )
    assert len(collected) == 3
    assert all(rollout.finish_reason != "abort" for rollout in collected)
    assert len(discarded.take()) == 3
