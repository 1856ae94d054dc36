"""Caps for prompts that come again: against loops, and what forgets them."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.config import RecallConfig
from megatron_prefix.prefix.recall import Recall, check, settled
from megatron_prefix.types import Rollout

CONFIG = RecallConfig(threshold=0.1, window=2, min_tokens=3, slack=1.5)
QUIET, LOUD = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0] * 6


def rollout(prompt: int, tokens: int = 6) -> Rollout:
    return Rollout((prompt, 2), (3,) * tokens, (0.0,) * tokens, "length", 0, 0)


def kl(*values: list[float]) -> list[np.ndarray]:
    return [np.array(one, np.float32) for one in values]


@settings(deadline=None)
@given(
    st.lists(st.floats(0.0, 1.0, width=32), max_size=40),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 5),
    st.floats(0.01, 0.9),
)
def test_settled_is_the_first_quiet_window_from_the_least_tokens_on(
    values: list[float], window: int, least: int, start: int, threshold: float
) -> None:
    config = RecallConfig(threshold=threshold, window=window, min_tokens=least)
    found = settled(np.array(values, np.float32), config, start)

    def mean(end: int) -> float:
        return math.fsum(values[end - window : end]) / window

    ends = [end for end in range(window, len(values) + 1) if start + end >= least]
    if math.isfinite(found):
        place = int(found) - start
        assert place in ends and mean(place) <= threshold + 1e-6
        ends = [end for end in ends if end < place]
    assert all(mean(end) > threshold - 1e-6 for end in ends)


def test_a_prompt_gets_what_the_neediest_of_its_samples_needed_and_slack() -> None:
    recall = Recall(CONFIG)
    assert recall.cap((1, 2), 100) == 100
    later = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    recall.observe([rollout(1), rollout(1), rollout(7)], kl(QUIET, later, QUIET))
    assert recall.cap((1, 2), 100) == 6  # settled at 4
    assert recall.cap((7, 2), 100) == 5  # settled at 3, the least
    assert recall.cap((1, 2), 5) == 5
    assert recall.cap((9, 2), 100) == 100


def test_a_cap_within_which_the_kl_has_not_settled_is_forgotten() -> None:
    recall = Recall(CONFIG)
    recall.observe([rollout(1)], kl(QUIET))
    assert recall.cap((1, 2), 100) == 5
    recall.observe([rollout(1, 5)], kl(LOUD[:5]))
    assert recall.cap((1, 2), 100) == 100
    recall.observe([rollout(1), rollout(1, 1)], kl(QUIET, [0.0]))  # one too short to tell
    assert recall.cap((1, 2), 100) == 100


def test_a_windows_positions_count_from_the_rollouts_first() -> None:
    recall = Recall(replace(CONFIG, slack=1.0))
    recall.observe([rollout(1, 16)], kl(QUIET), loss_start=10)
    assert recall.cap((1, 2), 100) == 12


def test_state_goes_round() -> None:
    recall, other = Recall(CONFIG), Recall(CONFIG)
    recall.observe([rollout(1)], kl(QUIET))
    other.load_state_dict(recall.state_dict())
    assert other.state_dict() == recall.state_dict() != {}
    assert other.cap((1, 2), 100) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "prefix.recall.window=0"),
        ({"min_tokens": 0}, "prefix.recall.min_tokens=0"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"slack": 0.9}, "slack=0.9"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(replace(CONFIG, **change))
