"""The ``marginal`` policy: what its audits say, and what it makes of them."""

import math

import numpy as np
import pytest

from megatron_prefix.config import MarginalConfig, PrefixConfig
from megatron_prefix.prefix import PrefixObservation, build_policy


def audit(step: int, kl: list[float], reached: list[int]) -> PrefixObservation:
    by_position = np.where(np.asarray(reached) > 0, kl, math.nan)
    mean = float(np.nansum(by_position * reached) / sum(reached)) if any(reached) else math.nan
    return PrefixObservation(step, len(kl), 0, mean, by_position, np.asarray(reached), 10.0)


@pytest.mark.parametrize(
    ("kl", "reached", "best"),
    [
        # Most KL a computed token of 10 + L: 2/11, 4/12, 4.1/13 and so on.
        ([2.0, 2.0, 0.1, 0.1, 0.1, 0.1], [8] * 6, 2),
        ([0.5] * 6, [8] * 6, 6),
        ([0.1, 0.1, 0.1, 0.1, 0.1, 3.0], [8] * 6, 6),
        # The same last KL, seen in one rollout of eight, is not worth the tokens.
        ([0.5, 0.1, 0.1, 0.1, 0.1, 0.4], [8, 8, 8, 8, 8, 1], 5),
        ([1.0, 1.0, 0.0, 0.0, 0.0, 0.0], [8, 8, 0, 0, 0, 0], 2),
    ],
)
def test_marginal_cuts_where_an_audit_showed_the_most_kl_a_token(
    kl: list[float], reached: list[int], best: int
) -> None:
    config = PrefixConfig("marginal", 1, 6, marginal=MarginalConfig(audit_every=3))
    policy = build_policy(config, 100)
    assert [policy.length(step) for step in range(4)] == [6, 6, 6, 6]
    policy.observe(audit(0, kl, reached))
    assert [policy.length(step) for step in range(5)] == [6, best, best, 6, best]


def test_the_shortest_of_the_last_audits_counts_and_no_other_step() -> None:
    config = PrefixConfig("marginal", 2, 6, marginal=MarginalConfig(audit_every=3, audits=3))
    policy = build_policy(config, 100)
    for step in range(3):
        policy.observe(audit(step, [0.5] * 6, [8] * 6))
    assert policy.length(4) == 6
    policy.observe(audit(3, [3.0, 0, 0, 0, 0, 0], [8] * 6))  # 1, below min_length
    assert policy.length(4) == 2
    policy.observe(audit(6, [1.0, 1.0, 1.0, 0, 0, 0], [8] * 6))
    policy.observe(audit(9, [math.nan] * 6, [0] * 6))
    assert policy.length(4) == 2  # of 6, 1, 3
    policy.observe(audit(12, [0.5] * 6, [8] * 6))
    assert policy.length(4) == 2  # of 1, 3, 6
    policy.observe(audit(15, [0.5] * 6, [8] * 6))
    assert policy.length(4) == 3  # of 3, 6, 6


def test_with_fewer_audits_after_a_resume_the_newest_stay() -> None:
    four = PrefixConfig("marginal", 1, 6, marginal=MarginalConfig(audit_every=1, audits=4))
    before = build_policy(four, 100)
    for step, best in enumerate((1, 3, 5)):
        before.observe(audit(step, [0.5] * best + [0.0] * (6 - best), [8] * 6))
    two = PrefixConfig("marginal", 1, 6, marginal=MarginalConfig(audit_every=3, audits=2))
    after = build_policy(two, 100)
    after.load_state_dict(before.state_dict())
    assert after.length(4) == 3  # of 3 and 5
