"""Packing: what is fed, what is predicted, how it is weighted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prefix.batch import pack, plan_microbatches, prefix_count
from megatron_prefix.types import Rollout

CPU = torch.device("cpu")


def rollout(prompt: int, prefix: int, index: int = 0) -> Rollout:
    ids = tuple(range(1, prompt + prefix + 1))
    logprobs = tuple(-float(i) for i in range(prefix))
    return Rollout(ids[:prompt], ids[prompt:], logprobs, "length", 0, index)


lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 7)), min_size=1, max_size=12).filter(
    lambda pairs: any(prefix for _, prefix in pairs)
)


@given(lengths, st.integers(1, 4), st.sampled_from([1, 2, 8]), st.integers(0, 6))
def test_every_token_in_the_loss_is_predicted_once_from_the_token_before_it(
    pairs: list[tuple[int, int]], count: int, multiple: int, start: int
) -> None:
    rollouts = [rollout(*pair, index) for index, pair in enumerate(pairs)]
    start = min(start, max(prefix for _, prefix in pairs) - 1)
    plan = plan_microbatches(rollouts, count, multiple=multiple, loss_start=start)
    scored = [index for index, (_, prefix) in enumerate(pairs) if prefix > start]
    assert sorted(i for members in plan.members for i in members) == scored
    weight, seen = 0.0, 0
    for microbatch in range(count):
        batch = pack(rollouts, plan, microbatch, CPU)
        assert batch.input_ids.numel() == plan.tokens
        assert plan.tokens % multiple == 0
        assert batch.labels.numel() == prefix_count(rollouts, plan, microbatch)
        # Token ids of a rollout count up by one, so a label is its position's token plus one.
        assert torch.equal(batch.labels, batch.input_ids[batch.prefix_positions] + 1)
        assert torch.equal(batch.rollout_logprobs, -batch.prefix_offsets.float())
        assert all(offset >= start for offset in batch.prefix_offsets.tolist())
        weight += float(batch.token_weight.sum())
        seen += batch.labels.numel()
    assert seen == plan.loss_tokens == sum(max(prefix - start, 0) for _, prefix in pairs)
    assert weight == pytest.approx(1.0, abs=1e-6)


@given(lengths, st.integers(1, 4))
def test_sequences_lie_end_to_end_with_positions_of_their_own(
    pairs: list[tuple[int, int]], count: int
) -> None:
    rollouts = [rollout(*pair, index) for index, pair in enumerate(pairs)]
    plan = plan_microbatches(rollouts, count)
    for microbatch in range(count):
        batch = pack(rollouts, plan, microbatch, CPU)
        starts = batch.cu_seqlens.tolist()
        assert starts[0] == 0
        assert starts[-1] == plan.tokens
        sizes = [b - a for a, b in zip(starts[:-1], starts[1:], strict=True)]
        assert max(sizes) <= batch.max_seqlen
        expected = [i for size in sizes for i in range(size)]
        assert batch.position_ids.tolist() == expected


def test_equal_lengths_leave_no_padding() -> None:
    rollouts = [rollout(5, 3, i) for i in range(8)]
    plan = plan_microbatches(rollouts, 2)
    assert plan.tokens == 4 * 7
    assert pack(rollouts, plan, 0, CPU).cu_seqlens.tolist() == [0, 7, 14, 21, 28]


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="no prefix token from position 0 on in 2 rollouts"):
        plan_microbatches([rollout(3, 0), rollout(4, 0)], 2)
    with pytest.raises(ValueError, match="from position 5 on in 2 .* the longest of 5 tokens"):
        plan_microbatches([rollout(3, 5), rollout(4, 1)], 2, loss_start=5)


def test_a_window_feeds_the_tokens_before_it_of_what_it_scores() -> None:
    alone = [rollout(3, 5)]
    rollouts = [rollout(4, 2), *alone]  # the first ends before the window
    whole, window = plan_microbatches(alone, 1), plan_microbatches(rollouts, 1, loss_start=2)
    fed, scored = pack(alone, whole, 0, CPU), pack(rollouts, window, 0, CPU)
    assert torch.equal(fed.input_ids, scored.input_ids)
    assert torch.equal(fed.cu_seqlens, scored.cu_seqlens)
    # The tokens 6, 7, 8 at places 2, 3, 4.
    assert scored.labels.tolist() == [6, 7, 8]
    assert scored.prefix_positions.tolist() == [4, 5, 6]
    assert scored.prefix_offsets.tolist() == [2, 3, 4]
    assert scored.token_weight.tolist() == pytest.approx([1 / 3] * 3)
