"""``overlap``: where a step stopped being reliable, and the lengths that follow from it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.config import (
    ModeConfig,
    OverlapConfig,
    PrefixConfig,
    RecallConfig,
    Recipe,
    TrainConfig,
)
from megatron_prefix.prefix import PrefixObservation, build_policy
from megatron_prefix.prefix.overlap import OverlapPolicy, reliable_length
from megatron_prefix.prefix.recall import settled
from megatron_prefix.validate.prefix import check_prefix

SETTINGS = OverlapConfig(factor=2.0, threshold=0.5, window=2, momentum=0.5)
CONFIG = PrefixConfig("overlap", 4, 32, overlap=SETTINGS, overlap_k=16)


def observed(shares: list[float], tokens: list[int] | None = None) -> PrefixObservation:
    length = len(shares)
    counts = np.array(tokens or [3] * length)
    return PrefixObservation(
        step=0,
        prefix_length=length,
        loss_start=0,
        mean_kl=0.1,
        kl_by_position=np.zeros(length),
        tokens_by_position=counts,
        prompt_length=5.0,
        overlap_by_position=np.array(shares),
    )


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 4)), min_size=1, max_size=30),
    st.integers(1, 8),
    st.floats(0.05, 0.95),
)
def test_reliable_is_what_comes_before_the_first_low_window(
    pairs: list[tuple[float, int]], window: int, threshold: float
) -> None:
    shares = np.array([share if count else np.nan for share, count in pairs])
    tokens = np.array([count for _, count in pairs])
    found = reliable_length(shares, tokens, OverlapConfig(threshold=threshold, window=window))
    window = min(window, len(pairs))

    def low(at: int) -> bool:
        part = pairs[at : at + window]
        count = sum(n for _, n in part)
        return count > 0 and sum(s * n for s, n in part) / count < threshold - 1e-9

    assert 0 <= found <= len(pairs)
    assert not any(low(at) for at in range(min(found, len(pairs) - window + 1)))
    if found < len(pairs):
        part = pairs[found : found + window]
        assert sum(s * n for s, n in part) / sum(n for _, n in part) < threshold + 1e-9


def test_it_grows_while_all_is_reliable_and_comes_back_to_what_is() -> None:
    policy = build_policy(CONFIG, 10)
    lengths = [policy.length(0)]
    for _ in range(4):
        policy.observe(observed([0.9] * policy.length(0)))
        lengths.append(policy.length(0))
    assert lengths == [4, 8, 16, 32, 32]
    drifted = [0.9] * 6 + [0.1] * 26
    lengths = []
    for _ in range(9):
        policy.observe(observed(drifted[: policy.length(0)]))
        lengths.append(policy.length(0))
    # Half of the way to 6 each time; 7 tokens are reliable to their end, so it looks further again.
    assert lengths == [19, 13, 10, 8, 7, 14, 10, 8, 7]
    policy.observe(observed([0.0] * policy.length(0)))
    policy.observe(observed([0.0] * policy.length(0)))
    policy.observe(observed([0.0] * policy.length(0)))
    assert policy.length(0) == 4


def test_steps_that_say_nothing_of_it_change_nothing() -> None:
    policy = build_policy(CONFIG, 10)
    policy.observe(replace(observed([0.9] * 4), overlap_by_position=np.zeros(0)))  # supervised
    policy.observe(observed([0.9] * 9))  # a recording of another length
    assert policy.length(5) == 4
    policy.observe(observed([0.9] * 4))
    again = build_policy(CONFIG, 10)
    again.load_state_dict(policy.state_dict())
    assert again.length(0) == policy.length(0) == 8


def test_a_cap_is_where_the_overlap_has_fallen() -> None:
    config = RecallConfig(threshold=0.5, signal="overlap", window=2, min_tokens=1)
    assert settled(np.array([1.0, 0.9, 0.8, 0.4, 0.3, 0.9]), config) == 5.0
    assert settled(np.array([1.0, 0.9, 0.8, 0.7]), config) == float("inf")


@pytest.mark.parametrize(
    ("prefix", "words"),
    [
        (replace(CONFIG, overlap_k=0), "policy=overlap needs tokens .* prefix.overlap_k=16"),
        (
            PrefixConfig(recall=RecallConfig(threshold=0.5, signal="overlap")),
            "recall.signal=overlap needs tokens",
        ),
        (
            PrefixConfig(overlap_k=4, recall=RecallConfig(threshold=1.5, signal="overlap")),
            "threshold=1.5 is no share",
        ),
        (replace(CONFIG, overlap=OverlapConfig(factor=1.0)), "factor=1.0 must be above 1; try 1.5"),
        (replace(CONFIG, overlap=OverlapConfig(threshold=1.0)), "between 0 and 1; try 0.5"),
        (replace(CONFIG, overlap=OverlapConfig(window=0)), "window=0 must be at least 1 token"),
        (replace(CONFIG, overlap=OverlapConfig(momentum=1.0)), "momentum=1.0 must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(prefix: PrefixConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_prefix(Recipe(prefix=prefix, train=TrainConfig(steps=3)))


def test_a_run_without_a_teacher_has_no_overlap() -> None:
    recipe = Recipe(prefix=CONFIG, train=TrainConfig(steps=3))
    check_prefix(recipe)
    assert isinstance(build_policy(CONFIG, 3), OverlapPolicy)
    with pytest.raises(ValueError, match="no step of mode.name=sft asks a teacher"):
        check_prefix(replace(recipe, mode=ModeConfig("sft")))
