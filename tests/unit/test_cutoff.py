"""Cut-offs of single rollouts: the rules, and how a server's stream is cut."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.config import CutOffConfig
from megatron_prefix.prefix import SampledToken, build_cut_off
from megatron_prefix.prefix.cutoff import CutOffRule, entropy_bound
from megatron_prefix.rollout.protocol import UnexpectedAnswer
from megatron_prefix.rollout.streaming import EventReader, StreamedGeneration
from tests.cut_offs import cut_length
from tests.refused import refusal_of

SIGNALS = st.lists(st.floats(0.0, 2.0), min_size=1, max_size=60)
CONFIGS = st.builds(
    CutOffConfig,
    rule=st.just("surprisal"),
    threshold=st.floats(0.05, 1.5),
    window=st.integers(1, 12),
    min_tokens=st.integers(1, 20),
)


class EveryThird:
    """A user's own: each rollout has three tokens."""

    def __init__(self, config: CutOffConfig, vocab_size: int) -> None:
        self._seen = 0

    def feed(self, token: SampledToken) -> bool:
        self._seen += 1
        return self._seen == 3


class FifthFails(EveryThird):
    def feed(self, token: SampledToken) -> bool:
        self._seen += 1
        return 1 / (5 - self._seen) < 0


class NoRule:
    def __init__(self, config: CutOffConfig, vocab_size: int) -> None:
        self.config = config


def rule(config: CutOffConfig, vocab_size: int = 100) -> CutOffRule:
    built = build_cut_off(config, vocab_size)
    assert built is not None
    return built


def tokens(signals: list[float]) -> list[SampledToken]:
    return [SampledToken(-signal) for signal in signals]


@settings(deadline=None)
@given(CONFIGS, SIGNALS)
def test_a_cut_is_the_first_full_window_at_or_under_the_threshold(
    config: CutOffConfig, signals: list[float]
) -> None:
    first = max(config.min_tokens, config.window)
    settled = [
        end
        for end in range(first, len(signals) + 1)
        if math.fsum(signals[end - config.window : end]) / config.window <= config.threshold
    ]
    expected = settled[0] if settled else len(signals)
    assert cut_length(rule(config).start(), tokens(signals)) == expected


@settings(deadline=None)
@given(CONFIGS, SIGNALS, st.data())
def test_what_comes_after_a_cut_has_no_say_in_it(
    config: CutOffConfig, signals: list[float], data: st.DataObject
) -> None:
    built = rule(config)
    kept = cut_length(built.start(), tokens(signals))
    other = signals[:kept] + data.draw(SIGNALS)
    if kept < len(signals):
        assert cut_length(built.start(), tokens(other)) == kept


@settings(deadline=None)
@given(CONFIGS, SIGNALS, st.floats(0.01, 1.0))
def test_a_higher_threshold_never_cuts_later(
    config: CutOffConfig, signals: list[float], more: float
) -> None:
    looser = CutOffConfig("surprisal", config.threshold + more, config.window, config.min_tokens)
    sooner, later = (cut_length(rule(c).start(), tokens(signals)) for c in (looser, config))
    assert sooner <= later


@settings(deadline=None)
@given(st.integers(2, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.1, 8.0))
def test_the_bound_is_never_below_the_entropy_and_is_it_where_all_is_known(
    vocab: int, k: int, seed: int, spread: float
) -> None:
    logits = spread * np.random.default_rng(seed).standard_normal(vocab)
    logprobs = np.sort(logits - np.logaddexp.reduce(logits))[::-1]
    entropy = -float((np.exp(logprobs) * logprobs).sum())
    seen = SampledToken(0.0, tuple(logprobs[: min(k, vocab)].tolist()))
    bound = entropy_bound(seen, vocab)
    assert entropy - 1e-9 <= bound <= math.log(vocab) + 1e-9
    if k >= vocab - 1:
        assert bound == pytest.approx(entropy, abs=1e-9)


def test_a_users_own_rule_is_built_anew_for_each_rollout() -> None:
    built = rule(CutOffConfig(rule=f"{__name__}:EveryThird"))
    assert [cut_length(built.start(), tokens([1.0] * 5)) for _ in range(2)] == [3, 3]


def test_what_a_users_rule_raises_names_it_and_the_token() -> None:
    built = rule(CutOffConfig(rule=f"{__name__}:FifthFails"))
    assert cut_length(built.start(), tokens([0.1] * 4)) == 4
    told = refusal_of(cut_length, built.start(), tokens([0.1] * 9))
    assert told.startswith(
        f"prefix.cut_off.rule={__name__}:FifthFails: feed of a rollout's token 5"
    )
    assert "ZeroDivisionError" in told


def test_no_rule_is_none() -> None:
    assert build_cut_off(CutOffConfig(), 100) is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CutOffConfig("entrpy"), "Did you mean 'entropy'"),
        (CutOffConfig("zzz"), "Choose one of none, surprisal, entropy"),
        (CutOffConfig("entropy", threshold=0.0), "prefix.cut_off.threshold=0.0"),
        (CutOffConfig("entropy", threshold=math.nan), "prefix.cut_off.threshold=nan"),
        (CutOffConfig("entropy", window=0), "prefix.cut_off.window=0"),
        (CutOffConfig("entropy", top_k=0), "prefix.cut_off.top_k=0"),
        (CutOffConfig("surprisal", check_every=0), "prefix.cut_off.check_every=0"),
        (CutOffConfig("no.such:Rule"), "cannot be imported"),
        (CutOffConfig(f"{__name__}:NoRule"), "lacks feed"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(
    config: CutOffConfig, message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        build_cut_off(config, 100)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def event(ids: list[int], total: int, reason: str | None = None) -> dict:
    meta = {
        "completion_tokens": total,
        "output_token_logprobs": [[-0.5, token, None] for token in ids],
        "finish_reason": reason and {"type": reason},
        "weight_version": "v4",
    }
    return {"output_ids": ids, "meta_info": meta}


INCREMENTS = [event([7, 8], 2), event([9, 10], 4), event([11], 5, "abort")]
WHOLES = [event([7, 8], 2), event([7, 8, 9, 10], 4), event([7, 8, 9, 10, 11], 5, "abort")]


def streamed(events: list[dict], rule_name: str = "EveryThird") -> StreamedGeneration:
    seen = StreamedGeneration(
        rule(CutOffConfig(rule=f"{__name__}:{rule_name}")).start(), "http://x"
    )
    for one in events:
        seen.add(one)
    return seen


@pytest.mark.parametrize("events", [INCREMENTS, WHOLES], ids=["since the last", "all so far"])
def test_a_stream_of_either_kind_is_cut_at_the_rules_token(events: list[dict]) -> None:
    assert not streamed(events[:1]).cut and streamed(events[:2]).cut
    generation = streamed(events).result()
    assert generation.token_ids == (7, 8, 9)
    assert (generation.finish_reason, generation.policy_version) == ("cut", 4)
    assert (len(generation.logprobs), generation.discarded) == (3, 2)


def test_a_rollout_that_ends_by_itself_where_it_would_be_cut_is_not_called_cut() -> None:
    ended = streamed([event([7, 8, 9], 3, "stop")]).result()
    assert (ended.finish_reason, ended.discarded) == ("stop", 0)
    aborted = streamed([event([7, 8, 9], 3, "abort")]).result()
    assert (aborted.finish_reason, aborted.discarded) == ("cut", 0)
    early = streamed([event([7, 8], 2, "abort")]).result()
    assert (early.finish_reason, len(early.token_ids)) == ("abort", 2)


def test_a_last_event_that_repeats_its_token_adds_none() -> None:
    assert streamed([event([7, 8], 2), event([8], 2, "length")]).result().token_ids == (7, 8)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_events_are_whole_however_the_bytes_arrive(size: int) -> None:
    text = "".join(f"data: {json.dumps(one)}\n\n" for one in INCREMENTS) + "data: [DONE]\n\n"
    data, reader = text.encode(), EventReader("http://x")
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert [one for piece in pieces for one in reader.feed(piece)] == INCREMENTS


@pytest.mark.parametrize(
    ("line", "words"), [(b"data: {oops\n", "oops"), (b'data: {"error": "full"}\n', "full")]
)
def test_an_event_that_is_none_is_quoted(line: bytes, words: str) -> None:
    with pytest.raises(UnexpectedAnswer, match=f"http://x streamed no generation: .*{words}"):
        list(EventReader("http://x").feed(line))


def test_streams_that_lack_something_say_what() -> None:
    with pytest.raises(UnexpectedAnswer, match="after 2 tokens without a finish reason"):
        streamed(INCREMENTS[:1]).result()
    odd = event([7, 8], 3)
    with pytest.raises(UnexpectedAnswer, match="3 new tokens among 2"):
        streamed([odd])
    other = event([7, 8], 2)
    other["output_ids"] = [7, 9]
    with pytest.raises(UnexpectedAnswer, match="log-probabilities of 2"):
        streamed([other])
