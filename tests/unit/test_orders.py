"""How an order's rollouts become microbatches."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prefix.batch import plan_microbatches
from megatron_prefix.config import TrainConfig
from megatron_prefix.orders import Order, microbatches
from megatron_prefix.types import Rollout

TRAIN = TrainConfig(global_batch_size=64, micro_batch_size=4)


def rollouts(count: int) -> tuple[Rollout, ...]:
    return tuple(
        Rollout((1, 2), (3,) * (1 + n % 7), (-1.0,) * (1 + n % 7), "length", 0, n)
        for n in range(count)
    )


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_whole_batch_has_all_of_its_microbatches(replicas: int) -> None:
    order = Order("train", 7, rollouts(64), loss_start=0)
    expected = plan_microbatches(order.rollouts, 16, multiple=8, replicas=replicas)
    assert microbatches(order, TRAIN, 8, replicas) == expected


@given(st.integers(1, 64), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_a_probes_rollouts_fill_the_least_microbatches_on_all_replicas(
    count: int, replicas: int, micro: int
) -> None:
    train = replace(TRAIN, micro_batch_size=micro)
    plan = microbatches(Order("probe", 7, rollouts(count)), train, 8, replicas)
    a_replica = -(-count // (micro * replicas))
    assert len(plan) == a_replica * replicas
    assert max(map(len, plan.members)) <= micro
    shares = [[len(plan.members[m]) for m in plan.of_replica(r, replicas)] for r in range(replicas)]
    assert sum(map(sum, shares)) == count
    assert len(plan) > replicas or sum(map(any, shares)) == min(count, replicas)


def test_rollouts_that_end_before_the_window_take_no_microbatch() -> None:
    order = Order("train", 7, rollouts(64), loss_start=6)  # every seventh is longer
    plan = microbatches(order, TRAIN, 8, 2)
    assert len(plan) == 4 and sum(map(len, plan.members)) == plan.loss_tokens == 9


def test_a_probe_of_several_teachers_takes_equally_many_on_every_replica() -> None:
    domains = ("", "math", "math", "code", "math")
    probed = tuple(replace(r, domain=d) for r, d in zip(rollouts(5), domains, strict=True))
    plan = microbatches(Order("probe", 7, probed), TRAIN, 8, 2)
    assert plan.domains == ("", "code", "math", "math")
    assert sorted(map(len, plan.members)) == [1, 1, 1, 2]
