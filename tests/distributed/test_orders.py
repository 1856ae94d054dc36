"""Rank 0's decision reaches every rank whole; its failure ends every rank with its words."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_prefix.batch import pack, plan_microbatches
from megatron_prefix.orders import Order, share_order
from megatron_prefix.types import Rollout
from tests.distributed.ranks import run_ranks

ROLLOUTS = (
    Rollout((1, 2, 3), (4, 5), (-0.1, -2.5), "length", 7, 11),
    Rollout((9,), (), (), "cut", 6, 12, discarded=3),
    Rollout((1,), (2,), (-3.25,), "stop", 7, 13, written=True, teacher_prompt_ids=(6, 5, 4)),
)


def received(order: Order) -> Order:
    got = share_order(lambda: order, dist.group.WORLD)
    return replace(got, rollouts=tuple(map(kept, got.rollouts)))


def kept(rollout: Rollout) -> Rollout:
    """With tuples for the views that another rank has."""
    return replace(
        rollout,
        prompt_ids=tuple(rollout.prompt_ids),
        prefix_ids=tuple(rollout.prefix_ids),
        rollout_logprobs=tuple(rollout.rollout_logprobs),
        teacher_prompt_ids=tuple(rollout.teacher_prompt_ids),
    )


def packed_alike(order: Order) -> bool:
    """Whether what came makes the microbatches that the rollouts make which were sent."""
    got = share_order(lambda: order, dist.group.WORLD)
    plan = plan_microbatches(order.rollouts, 2, multiple=8)
    mine, sent = (
        [pack(each.rollouts, plan, m, torch.device("cpu")) for m in range(2)]
        for each in (got, order)
    )
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for x, y in zip(mine, sent, strict=True)
        for a, b in zip(vars(x).values(), vars(y).values(), strict=True)
    )


def test_what_came_is_packed_as_what_was_sent() -> None:
    assert run_ranks(2, packed_alike, Order("train", 5, ROLLOUTS)) == [True, True]


@pytest.mark.parametrize(
    "order",
    [
        Order("train", 5, ROLLOUTS),
        Order("save_and_stop"),
        Order("train", 9, ROLLOUTS, loss_start=4, supervised=True, discarded=((3, 7), (9, 1))),
    ],
)
def test_every_rank_gets_what_rank_0_decided(order: Order) -> None:
    for got in run_ranks(3, received, order):
        assert (got.kind, got.prefix_length) == (order.kind, order.prefix_length)
        assert (got.loss_start, got.supervised) == (order.loss_start, order.supervised)
        assert got.discarded == order.discarded
        assert [r.written for r in got.rollouts] == [r.written for r in order.rollouts]
        assert [r.discarded for r in got.rollouts] == [r.discarded for r in order.rollouts]
        theirs = [r.teacher_prompt_ids for r in got.rollouts]
        assert theirs == [r.teacher_prompt_ids for r in order.rollouts]
        assert len(got.rollouts) == len(order.rollouts)
        for mine, sent in zip(got.rollouts, order.rollouts, strict=True):
            assert mine.prompt_ids == sent.prompt_ids
            assert mine.prefix_ids == sent.prefix_ids
            assert mine.rollout_logprobs == pytest.approx(sent.rollout_logprobs)
            assert mine.finish_reason == sent.finish_reason
            assert (mine.policy_version, mine.prompt_index) == (
                sent.policy_version,
                sent.prompt_index,
            )


def failing() -> str:
    def decide() -> Order:
        raise ConnectionError("the server is gone")

    try:
        share_order(decide, dist.group.WORLD)
    except (RuntimeError, ConnectionError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_failure_on_rank_0_is_one_on_every_rank() -> None:
    first, *others = run_ranks(3, failing)
    assert first == "ConnectionError: the server is gone"
    assert others == ["RuntimeError: rank 0 failed: ConnectionError: the server is gone"] * 2
