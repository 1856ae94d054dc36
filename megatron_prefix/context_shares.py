"""Which of a microbatch's packed tokens a context-parallel rank holds. Pure.

Each sequence is cut into 2 * C pieces, and rank r holds pieces r and 2 * C - 1 - r of all of them:
under causal attention an early and a late piece together are equally much work on every rank. It
is the cut that Megatron-Core's rotary embeddings and Transformer Engine's attention expect.

Legend: C context-parallel ranks, T packed tokens, N prefix positions, n those of one rank.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.types import PrefixBatch, Rows, Targets


def zigzag(cu_seqlens: Tensor, ranks: int) -> Tensor:
    """int64 [C, T / C]: the packed tokens of each rank, in its order.

    ``cu_seqlens`` [B+1] of sequences whose lengths are multiples of 2 * C (``batch.padded_for``).
    """
    lengths = cu_seqlens.diff().long()
    piece = within_sequences(cu_seqlens) // (lengths // (2 * ranks)).repeat_interleave(lengths)
    return torch.minimum(piece, 2 * ranks - 1 - piece).argsort(stable=True).view(ranks, -1)


def within_sequences(cu_seqlens: Tensor) -> Tensor:
    """int64 [T]: where each packed token is in its own sequence."""
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff())
    return torch.arange(len(starts), device=starts.device) - starts


def share_of(batch: PrefixBatch, rank: int, ranks: int) -> PrefixBatch:
    """The tokens of one rank, and the prefix positions among them.

    ``cu_seqlens``, ``max_seqlen`` and ``position_ids`` stay the whole pack's, which keys and rotary
    angles are taken from. The one rank of a model that is not cut has the whole batch.
    """
    if ranks == 1:
        return batch
    own = zigzag(batch.cu_seqlens, ranks)[rank]
    place = torch.full_like(batch.input_ids, -1)
    place[own] = torch.arange(len(own), device=own.device)
    at = place[batch.prefix_positions]
    held = at >= 0
    rows = held.nonzero()[:, 0]  # the one wait for the device
    return replace(
        batch,
        input_ids=batch.input_ids[own],
        prefix_positions=at[rows],
        labels=batch.labels[rows],
        token_weight=batch.token_weight[rows],
        rollout_logprobs=batch.rollout_logprobs[rows],
        ends=(held.cumsum(0) - 1)[batch.ends[held[batch.ends]]],
        prefix_offsets=batch.prefix_offsets[rows],
        rows=Rows(rows, len(held)),
    )


def of_all_shares(own: Tensor, rows: Rows | None, group: dist.ProcessGroup) -> Tensor:
    """[N, ...] out of each rank's [n, ...], on all ranks of ``group``: sums with zeros, so exact.

    ``rows`` are those of :func:`share_of`. No gradient passes. Collective over ``group``.
    """
    if rows is None:
        return own
    whole = own.new_zeros((rows.count, *own.shape[1:]))
    whole[rows.index] = own
    if rows.count:
        dist.all_reduce(whole, group=group)
    return whole


def rows_of(target: Targets, rows: Rows | None) -> Targets:
    """What a target of a whole microbatch [N, ...] says of one rank's prefix positions [n, ...]."""
    if rows is None:
        return target
    return replace(target, **{name: value[rows.index] for name, value in vars(target).items()})
