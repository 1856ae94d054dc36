"""Policies that learn from probes, a user's own among them, and the one that the docs show."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.config import AdaptiveConfig, AuditedConfig, PrefixConfig
from megatron_prefix.prefix import (
    PrefixPolicy,
    ProbeObservation,
    build_policy,
    is_scheduled,
    observe_probe,
)
from megatron_prefix.prefix.adaptive import ON_TAIL
from megatron_prefix.prefix.policy import ScheduledPolicy
from tests.unit.test_prefix_policies import HalfPolicy, configs, lengths


class PlainPolicy(HalfPolicy):
    """A user's own that asks for no probes."""


@dataclass(frozen=True)
class Seen:
    """A step's KL, and what the probe after it showed."""

    kl: float
    tail: float
    agreement: float


RUNS = st.lists(
    st.builds(
        Seen,
        st.floats(0.0, 2.0) | st.just(math.nan),
        st.floats(0.0, 2.0) | st.just(math.nan),
        st.floats(-1.0, 1.0) | st.just(math.nan),
    ),
    min_size=1,
    max_size=60,
)


def probe(step: int, length: int, tail: float, agreement: float = math.nan) -> ProbeObservation:
    return ProbeObservation(step, length, 0.1, tail, agreement, np.full(length, 0.1))


def probed_lengths(policy: PrefixPolicy, run: list[Seen], first: int = 0) -> list[int]:
    """As :func:`lengths`, with a probe after every step."""
    seen = []
    for step, one in enumerate(run, start=first):
        seen.extend(lengths(policy, [one.kl], step))
        observe_probe(policy, probe(step + 1, policy.length(step + 1), one.tail, one.agreement))
    return seen


@settings(deadline=None)
@given(configs(), RUNS)
def test_probes_keep_lengths_within_bounds_and_move_those_alone_who_want_to_know(
    config: PrefixConfig, run: list[Seen]
) -> None:
    seen = probed_lengths(build_policy(config, len(run)), run)
    assert all(config.min_length <= length <= config.max_length for length in seen)
    if config.policy not in ("adaptive", "audited"):
        assert seen == lengths(build_policy(config, len(run)), [one.kl for one in run])
    if config.policy == "adaptive" and config.adaptive.on_tail != "shrink":
        assert seen == sorted(seen)


@settings(deadline=None)
@given(configs(), RUNS, st.data())
def test_resumed_after_a_probe_a_policy_goes_on_as_if_it_had_never_stopped(
    config: PrefixConfig, run: list[Seen], data: st.DataObject
) -> None:
    stop = data.draw(st.integers(0, len(run)))
    whole = probed_lengths(build_policy(config, len(run)), run)
    before, after = (build_policy(config, len(run)) for _ in range(2))
    head = probed_lengths(before, run[:stop])
    after.load_state_dict(json.loads(json.dumps(before.state_dict(), allow_nan=False)))
    assert head + probed_lengths(after, run[stop:], first=stop) == whole


@pytest.mark.parametrize(
    ("on_tail", "after"), [("shrink", 8), ("grow", 32), ("hold", 16)], ids=ON_TAIL
)
def test_adaptive_answers_a_worse_tail_at_the_same_length_as_it_is_told(
    on_tail: str, after: int
) -> None:
    settings = AdaptiveConfig(2.0, 0.3, 0.0, on_tail=on_tail, tail_tolerance=0.25)
    policy = build_policy(PrefixConfig("adaptive", 8, 64, adaptive=settings), 100)
    observe_probe(policy, probe(0, 8, 0.5))
    assert lengths(policy, [0.2, 0.9]) == [8, 16]  # a new length has a new tail
    for step, tail in ((2, 1.0), (3, 1.25), (4, 0.8)):  # within the tolerance; and better
        observe_probe(policy, probe(step, 16, tail))
        assert policy.length(step) == 16
    observe_probe(policy, probe(5, 8, 9.0))  # of another length
    assert policy.length(5) == 16
    observe_probe(policy, probe(6, 16, 1.01))
    assert policy.length(6) == after


def test_audited_grows_where_gradients_part_and_shrinks_where_they_agree() -> None:
    config = PrefixConfig("audited", 10, 30, audited=AuditedConfig(1.5, 0.6, 0.9))
    policy = build_policy(config, 100)
    seen = []
    for step, agreement in enumerate([0.5, math.nan, 0.6, 0.9, 0.1, 0.1, 0.1, 0.95, 1.0, 1.0, 1.0]):
        observe_probe(policy, probe(step, policy.length(step), 1.0, agreement))
        seen.append(policy.length(step))
    assert seen == [15, 15, 15, 15, 23, 30, 30, 20, 13, 10, 10]
    observe_probe(policy, probe(11, 13, 1.0, 0.1))
    assert policy.length(11) == 10


class Stepping(ScheduledPolicy):
    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        self._config, self._by = config, int(config.options["by"])

    def length(self, step: int) -> int:
        return min(self._config.min_length + self._by * step, self._config.max_length)


class CuriousPolicy(HalfPolicy):
    """A user's own that counts probes."""

    def observe_probe(self, observation: ProbeObservation) -> None:
        self.seen += 10


def test_a_users_own_policy_is_told_of_probes_where_it_asks() -> None:
    curious, other = (
        build_policy(PrefixConfig(f"{__name__}:{name}", 2, 30), 10)
        for name in ("CuriousPolicy", "PlainPolicy")
    )
    for policy in (curious, other):
        observe_probe(policy, probe(0, 15, 1.0))
    assert (curious.state_dict(), other.state_dict()) == ({"seen": 10.0}, {"seen": 0.0})


def test_the_policy_that_the_documentation_shows_works_as_it_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "prefix-reference.md").read_text()
    (shown,) = re.findall(r"```python\n(.*?class Sawtooth.*?)```", page, re.DOTALL)
    assert len(shown.splitlines()) < 40
    space: dict[str, Any] = {}
    exec(shown, space)
    config = PrefixConfig("own", 10, 50, options={"period": 4})
    policy = space["Sawtooth"](config, 100)
    assert isinstance(policy, PrefixPolicy)
    assert [policy.length(step) for step in range(6)] == [10, 20, 30, 40, 10, 20]
    assert [line for line in page.splitlines() if "prefix.policy=sawtooth:Sawtooth" in line]


def test_a_users_schedule_is_known_as_one_and_its_missing_option_is_named() -> None:
    own = PrefixConfig(f"{__name__}:Stepping", 2, 30, options={"by": 4})
    assert is_scheduled(build_policy(own, 10))
    assert not is_scheduled(build_policy(PrefixConfig(f"{__name__}:PlainPolicy", 2, 30), 10))
    with pytest.raises(ValueError, match="asks for 'by', and prefix.options has nothing; set it"):
        build_policy(PrefixConfig(f"{__name__}:Stepping", 2, 30), 10)
