"""Prefix policies: bounds, promised order, state, and the refusal of settings that cannot be."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.config import (
    AdaptiveConfig,
    AnchoredConfig,
    AuditedConfig,
    CosineConfig,
    LateConfig,
    LinearConfig,
    MarginalConfig,
    PrefixConfig,
    StepsConfig,
    WindowConfig,
)
from megatron_prefix.prefix import (
    PrefixObservation,
    PrefixPolicy,
    build_policy,
    loss_start,
)
from megatron_prefix.prefix.adaptive import ON_TAIL
from megatron_prefix.prefix.registry import POLICIES

NEVER_SHORTER = ("fixed", "linear", "steps", "cosine", "late", "adaptive")
GROW_TO_FULL = ("linear", "steps", "cosine", "late")


class HalfPolicy:
    """A user's own: the half of max_length, or whatever options.length says."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        self._length = int(config.options.get("length", config.max_length // 2))
        self.seen = 0.0

    def length(self, step: int) -> int:
        return self._length

    def observe(self, observation: PrefixObservation) -> None:
        self.seen += 1

    def state_dict(self) -> dict[str, float]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seen = state["seen"]


class TailPolicy(HalfPolicy):
    """A user's own window: the loss begins at options.start."""

    def loss_start(self, step: int) -> int:
        return int(self._start)

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        super().__init__(config, total_steps)
        self._start = config.options["start"]


class NoPolicy:
    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        self.config = config


def observation(step: int, length: int, kl: float) -> PrefixObservation:
    by_position, reached = np.full(length, kl), np.full(length, 3)
    return PrefixObservation(step, length, 0, kl, by_position, reached, prompt_length=14.0)


def lengths(policy: PrefixPolicy, kls: list[float], first: int = 0) -> list[int]:
    """Lengths of ``len(kls)`` steps, each observed with its KL."""
    seen = []
    for step, kl in enumerate(kls, start=first):
        seen.append(policy.length(step))
        policy.observe(observation(step, seen[-1], kl))
    return seen


@st.composite
def configs(draw: st.DrawFn) -> PrefixConfig:
    low = draw(st.integers(1, 200))
    high = draw(st.integers(low, 4000))
    stop = draw(st.integers(low, high))
    share = st.floats(0.0, 1.0)
    return PrefixConfig(
        policy=draw(st.sampled_from(sorted(POLICIES))),
        min_length=low,
        max_length=high,
        steps=StepsConfig(stages=draw(st.integers(2, 9)), over=draw(share)),
        cosine=CosineConfig(over=draw(share)),
        window=WindowConfig(draw(st.integers(0, stop - 1)), stop),
        linear=LinearConfig(over=draw(share)),
        anchored=AnchoredConfig(every=draw(st.integers(1, 12))),
        late=LateConfig(full_after=draw(share)),
        adaptive=AdaptiveConfig(
            factor=draw(st.floats(1.01, 4.0)),
            threshold=draw(st.floats(0.01, 1.0)),
            momentum=draw(st.floats(0.0, 0.99)),
            on_tail=draw(st.sampled_from(ON_TAIL)),
            tail_tolerance=draw(st.floats(0.0, 1.0)),
        ),
        marginal=MarginalConfig(draw(st.integers(1, 12)), draw(st.integers(1, 7))),
        audited=AuditedConfig(draw(st.floats(1.01, 4.0)), 0.3, draw(st.floats(0.31, 1.0))),
    )


KLS = st.lists(st.floats(0.0, 2.0) | st.just(math.nan), min_size=1, max_size=60)


@settings(deadline=None)
@given(configs(), KLS)
def test_lengths_stay_within_bounds_and_grow_where_promised(
    config: PrefixConfig, kls: list[float]
) -> None:
    seen = lengths(build_policy(config, len(kls)), kls)
    assert all(config.min_length <= length <= config.max_length for length in seen)
    if config.policy in NEVER_SHORTER:
        assert seen == sorted(seen)


@settings(deadline=None)
@given(configs(), st.integers(1, 300))
def test_schedules_that_grow_end_at_the_full_length(config: PrefixConfig, steps: int) -> None:
    for name in GROW_TO_FULL:
        policy = build_policy(replace(config, policy=name), steps)
        assert policy.length(steps) == config.max_length


@settings(deadline=None)
@given(configs(), st.integers(1, 40), st.integers(0, 400))
def test_a_length_past_the_last_step_is_within_bounds_too(
    config: PrefixConfig, steps: int, past: int
) -> None:
    """A probe after the last step asks for one, and so does a plan of a shorter run."""
    policy = build_policy(config, steps)
    length = policy.length(steps + past)
    assert config.min_length <= length <= config.max_length
    assert 0 <= loss_start(policy, steps + past) < length


@settings(deadline=None)
@given(configs(), st.integers(0, 100))
def test_the_loss_begins_within_the_prefix_and_later_than_0_for_windows_alone(
    config: PrefixConfig, step: int
) -> None:
    policy = build_policy(config, 100)
    start = loss_start(policy, step)
    assert 0 <= start < policy.length(step)
    assert start == (config.window.start if config.policy == "window" else 0)


@settings(deadline=None)
@given(configs(), KLS, st.data())
def test_resumed_policy_goes_on_as_if_it_had_never_stopped(
    config: PrefixConfig, kls: list[float], data: st.DataObject
) -> None:
    stop = data.draw(st.integers(0, len(kls)))
    whole = lengths(build_policy(config, len(kls)), kls)
    before = build_policy(config, len(kls))
    head = lengths(before, kls[:stop])
    saved = json.loads(json.dumps(before.state_dict(), allow_nan=False))
    after = build_policy(config, len(kls))
    after.load_state_dict(saved)
    assert after.state_dict() == before.state_dict()
    assert head + lengths(after, kls[stop:], first=stop) == whole


@settings(deadline=None)
@given(configs(), st.integers(0, 500))
def test_asking_for_a_length_changes_nothing(config: PrefixConfig, step: int) -> None:
    policy = build_policy(config, 100)
    state, first = policy.state_dict(), policy.length(step)
    assert policy.length(step) == first
    assert policy.state_dict() == state


def test_fixed_is_min_length() -> None:
    policy = build_policy(PrefixConfig(policy="fixed", min_length=9, max_length=75), 200)
    assert {policy.length(step) for step in range(200)} == {9}


def test_linear_starts_at_min_and_reaches_max_after_its_share() -> None:
    config = PrefixConfig("linear", 10, 90, linear=LinearConfig(over=0.8))
    policy = build_policy(config, 100)
    assert [policy.length(step) for step in (0, 20, 40, 79, 80, 99, 150)] == [
        10,
        30,
        50,
        89,
        90,
        90,
        90,
    ]


def test_linear_over_nothing_is_full_from_the_start() -> None:
    config = PrefixConfig("linear", 10, 90, linear=LinearConfig(over=0.0))
    assert build_policy(config, 100).length(0) == 90


def test_steps_holds_each_length_for_an_equal_part_of_its_share() -> None:
    config = PrefixConfig("steps", 10, 70, steps=StepsConfig(stages=4, over=0.6))
    policy = build_policy(config, 100)
    at = [policy.length(step) for step in (0, 19, 20, 39, 40, 59, 60, 99)]
    assert at == [10, 10, 30, 30, 50, 50, 70, 70]


def test_two_stages_are_the_late_policy() -> None:
    steps = PrefixConfig("steps", 9, 75, steps=StepsConfig(stages=2, over=0.8))
    late = PrefixConfig("late", 9, 75, late=LateConfig(full_after=0.8))
    one, other = build_policy(steps, 200), build_policy(late, 200)
    assert [one.length(step) for step in range(200)] == [other.length(step) for step in range(200)]


def test_cosine_is_slow_at_both_ends_and_half_way_in_the_middle() -> None:
    policy = build_policy(PrefixConfig("cosine", 10, 110, cosine=CosineConfig(over=0.8)), 100)
    at = [policy.length(step) for step in (0, 20, 40, 60, 80, 99)]
    assert at == [10, 25, 60, 95, 110, 110]  # (1 - cos 45 degrees) / 2 = 0.146


def test_window_samples_up_to_its_stop_and_scores_from_its_start() -> None:
    config = PrefixConfig("window", 9, 75, window=WindowConfig(start=20, stop=40))
    policy = build_policy(config, 100)
    assert {(policy.length(step), loss_start(policy, step)) for step in range(100)} == {(40, 20)}
    to_the_end = build_policy(replace(config, window=WindowConfig(start=66)), 100)
    assert (to_the_end.length(5), loss_start(to_the_end, 5)) == (75, 66)


def test_anchored_is_full_at_the_last_of_every_n_steps() -> None:
    config = PrefixConfig("anchored", 9, 75, anchored=AnchoredConfig(every=4))
    policy = build_policy(config, 100)
    assert [policy.length(step) for step in range(8)] == [9, 9, 9, 75, 9, 9, 9, 75]


def test_late_is_short_then_full() -> None:
    config = PrefixConfig("late", 9, 75, late=LateConfig(full_after=0.8))
    policy = build_policy(config, 200)
    assert [policy.length(step) for step in (0, 159, 160, 199)] == [9, 9, 75, 75]


def test_adaptive_grows_when_the_average_falls_under_its_threshold_and_begins_anew() -> None:
    settings = AdaptiveConfig(factor=2.0, threshold=0.3, momentum=0.5)
    config = PrefixConfig("adaptive", 8, 20, adaptive=settings)
    policy = build_policy(config, 100)
    # Averages: 0.5; (0.5 + 0.3) / 2 = 0.4; (0.4 + 0.1) / 2 = 0.25 < 0.3, grow; anew 0.31; 0.295.
    assert lengths(policy, [0.5, 0.3, 0.1, 0.31, 0.28, 0.0]) == [8, 8, 8, 16, 16, 20]
    assert policy.length(6) == 20


def test_adaptive_takes_no_step_without_a_kl_into_account() -> None:
    config = PrefixConfig("adaptive", 8, 20)
    policy = build_policy(config, 100)
    assert lengths(policy, [math.nan, math.inf, math.nan]) == [8, 8, 8]
    assert policy.state_dict() == {"length": 8}


def test_a_users_own_policy_is_found_by_its_path_and_keeps_state() -> None:
    config = PrefixConfig(policy=f"{__name__}:HalfPolicy", min_length=2, max_length=30)
    policy = build_policy(config, 10)
    assert lengths(policy, [0.1, 0.2]) == [15, 15]
    assert policy.state_dict() == {"seen": 2.0}
    policy.load_state_dict({"seen": 7.0})
    assert policy.state_dict() == {"seen": 7.0}


@pytest.mark.parametrize(("start", "named"), [(15, "15"), (-1, "-1"), (99, "99")])
def test_a_users_window_outside_its_prefix_is_named(start: int, named: str) -> None:
    config = PrefixConfig(
        f"{__name__}:TailPolicy", min_length=2, max_length=30, options={"start": start}
    )
    with pytest.raises(ValueError, match=f"starts the loss of step 4 at {named}: .* length 15"):
        loss_start(build_policy(config, 10), 4)
    inside = build_policy(replace(config, options={"start": 14}), 10)
    assert loss_start(inside, 4) == 14


@pytest.mark.parametrize("length", [0, -3, 31])
def test_a_users_length_out_of_bounds_is_named(length: int) -> None:
    config = PrefixConfig(
        f"{__name__}:HalfPolicy", min_length=2, max_length=30, options={"length": length}
    )
    policy = build_policy(config, 10)
    with pytest.raises(ValueError, match=rf"answered {length} for step 4: .*max_length=30"):
        policy.length(4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_length": 0}, "prefix.min_length=0"),
        ({"min_length": 80}, "prefix.max_length=75 is below prefix.min_length=80"),
        ({"policy": "anchord"}, "Did you mean 'anchored'"),
        ({"policy": "zzz"}, "Choose one of fixed, linear"),
        ({"policy": "no.such.module:Policy"}, "cannot be imported"),
        ({"policy": f"{__name__}:Missing"}, "cannot be imported"),
        ({"policy": f"{__name__}:NoPolicy"}, "lacks one of length"),
        ({"policy": "linear", "linear": LinearConfig(1.5)}, "prefix.linear.over=1.5"),
        ({"policy": "steps", "steps": StepsConfig(stages=1)}, "prefix.steps.stages=1"),
        ({"policy": "steps", "steps": StepsConfig(over=2.0)}, "prefix.steps.over=2.0"),
        ({"policy": "cosine", "cosine": CosineConfig(over=-1.0)}, "prefix.cosine.over=-1.0"),
        ({"policy": "window", "window": WindowConfig(20, 20)}, "prefix.window.start=20"),
        ({"policy": "window", "window": WindowConfig(-1, 20)}, "prefix.window.start=-1"),
        ({"policy": "window", "window": WindowConfig(0, 76)}, "prefix.max_length=75"),
        ({"policy": "window", "window": WindowConfig(75)}, "to prefix.window.stop=75"),
        ({"policy": "late", "late": LateConfig(-0.1)}, "prefix.late.full_after=-0.1"),
        ({"policy": "anchored", "anchored": AnchoredConfig(0)}, "prefix.anchored.every=0"),
        ({"policy": "marginal", "marginal": MarginalConfig(0)}, "audit_every=0"),
        ({"policy": "marginal", "marginal": MarginalConfig(audits=0)}, "audits=0"),
        (
            {"policy": "adaptive", "adaptive": AdaptiveConfig(factor=1.0)},
            "factor=1.0 must be above 1",
        ),
        ({"policy": "adaptive", "adaptive": AdaptiveConfig(on_tail="x")}, "on_tail='x'"),
        (
            {"policy": "audited", "audited": AuditedConfig(low=0.9)},
            "low=0.9 must be below",
        ),
        ({"policy": "audited", "audited": AuditedConfig(factor=0.5)}, "factor=0.5"),
        ({"policy": "adaptive", "adaptive": AdaptiveConfig(momentum=1.0)}, "momentum=1.0"),
        ({"policy": "adaptive", "adaptive": AdaptiveConfig(threshold=0.0)}, "threshold=0.0"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line(
    change: dict[str, object], message: str
) -> None:
    config = replace(PrefixConfig("fixed", 9, 75), **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError) as refused:
        build_policy(config, 100)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_schedule_refuses_the_state_of_another_policy() -> None:
    policy = build_policy(PrefixConfig("linear", 9, 75), 100)
    with pytest.raises(ValueError, match="of another policy than LinearPolicy"):
        policy.load_state_dict({"length": 9})
