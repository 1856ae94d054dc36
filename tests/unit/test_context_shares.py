"""Context-parallel shares of packed microbatches: every token and every label is one rank's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prefix.batch import pack, padded_for, plan_microbatches
from megatron_prefix.context_shares import rows_of, share_of, within_sequences, zigzag
from megatron_prefix.plan.activations import positions_held, tokens_held
from megatron_prefix.types import Rollout, TopKTargets

CPU = torch.device("cpu")
lengths = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=6).filter(
    lambda pairs: any(prefix for _, prefix in pairs)
)


def rollout(prompt: int, prefix: int, index: int = 0) -> Rollout:
    """Its ids count up by one, so that a label is its position's token plus one."""
    ids = tuple(range(1, prompt + prefix + 1))
    logprobs = tuple(-float(i) for i in range(prefix))
    return Rollout(ids[:prompt], ids[prompt:], logprobs, ("stop", "length")[index % 2], 0, index)


def test_each_rank_has_an_early_and_a_late_piece_of_every_sequence() -> None:
    starts = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert zigzag(starts, 2).tolist() == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]
    assert within_sequences(starts).tolist() == [*range(8), *range(4)]


@given(lengths, st.integers(1, 3), st.sampled_from([2, 3, 4]), st.sampled_from([1, 8]))
def test_the_shares_are_the_microbatch(
    pairs: list[tuple[int, int]], count: int, ranks: int, multiple: int
) -> None:
    rollouts = [rollout(*pair, index) for index, pair in enumerate(pairs)]
    plain = plan_microbatches(rollouts, count, multiple=multiple)
    plan = padded_for(ranks, rollouts, plain)
    assert plan.tokens % (multiple * ranks) == 0
    assert padded_for(1, rollouts, plan) == plain
    for microbatch in range(count):
        whole, unpadded = (pack(rollouts, each, microbatch, CPU) for each in (plan, plain))
        assert torch.equal(whole.labels, unpadded.labels)
        shares = [share_of(whole, rank, ranks) for rank in range(ranks)]
        assert {len(share.input_ids) for share in shares} == {plan.tokens // ranks}
        rows = torch.cat([share.rows.index for share in shares if share.rows])
        assert sorted(rows.tolist()) == list(range(len(whole.labels)))
        ends: list[int] = []
        for share in shares:
            assert share.rows and share.rows.count == len(whole.labels)
            assert torch.equal(share.input_ids[share.prefix_positions] + 1, share.labels)
            assert torch.equal(share.labels, whole.labels[share.rows.index])
            assert torch.equal(share.rollout_logprobs, -share.prefix_offsets.float())
            ends += share.rows.index[share.ends].tolist()
        assert sorted(ends) == whole.ends.tolist()


def test_one_rank_has_the_batch_itself() -> None:
    batch = pack([rollout(3, 4)], plan_microbatches([rollout(3, 4)], 1), 0, CPU)
    assert share_of(batch, 0, 1) is batch


def test_a_target_is_cut_as_its_batch() -> None:
    rollouts = [rollout(4, 6)]
    plan = padded_for(2, rollouts, plan_microbatches(rollouts, 1))
    share = share_of(pack(rollouts, plan, 0, CPU), 1, 2)
    target = TopKTargets(torch.arange(12).view(6, 2), torch.zeros(6, 2))
    cut = rows_of(target, share.rows)
    assert isinstance(cut, TopKTargets) and share.rows
    assert cut.ids[:, 0].tolist() == (2 * share.rows.index).tolist() != []
    assert rows_of(target, None) is target


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("prompt", "prefix"), [(1, 9), (20, 3), (5, 12), (7, 1)])
def test_what_the_plan_counts_is_what_the_fullest_rank_has(
    ranks: int, prompt: int, prefix: int
) -> None:
    rollouts = [rollout(prompt, prefix)]
    batch = pack(rollouts, padded_for(ranks, rollouts, plan_microbatches(rollouts, 1)), 0, CPU)
    shares = [share_of(batch, rank, ranks) for rank in range(ranks)]
    assert max(len(share.labels) for share in shares) == positions_held(ranks, prompt, prefix)
    assert len(shares[0].input_ids) == tokens_held(ranks, prompt + prefix - 1)
