"""Rollouts to packed microbatches: pure functions of their arguments.

Legend: T packed tokens of a microbatch, B sequences, N prefix positions, P prompt, L prefix tokens.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_prefix.rollout.scoring import Passage
from megatron_prefix.types import PrefixBatch, Rollout


@dataclass(frozen=True)
class MicrobatchPlan:
    """Which rollouts go into which microbatch of the step, alike on every rank.

    Microbatch ``m`` belongs to the student's data-parallel rank ``m // per_rank``.
    """

    members: tuple[tuple[int, ...], ...]  # rollout indices of each microbatch
    tokens: int  # T of every microbatch of the step
    loss_tokens: int  # over all microbatches: the one denominator
    loss_start: int = 0  # prefix positions before it are fed and not scored
    multiple: int = 1  # of which a rank's tokens are one
    domains: tuple[str, ...] = ()  # of each microbatch's rollouts; empty: all of the one teacher
    context_ranks: int = 1  # that share each microbatch's tokens, which are padded for them

    def domain(self, microbatch: int) -> str:
        return self.domains[microbatch] if self.domains else ""

    def of_replica(self, dp_rank: int, dp: int) -> range:
        """The microbatches of one of the student's ``dp`` data-parallel ranks."""
        share = len(self.members) // dp
        return range(dp_rank * share, (dp_rank + 1) * share)

    @property
    def sequence_multiple(self) -> int:
        """Of which each sequence's tokens are one."""
        return 2 * self.context_ranks if self.context_ranks > 1 else 1

    def __len__(self) -> int:
        return len(self.members)


def plan_microbatches(
    rollouts: Sequence[Rollout],
    count: int,
    *,
    multiple: int = 1,
    loss_start: int = 0,
    replicas: int = 1,
) -> MicrobatchPlan:
    """Spread ``rollouts`` over ``count`` microbatches, longest first onto the emptiest.

    Every microbatch has the same T, a multiple of ``multiple``, so that pipeline stages exchange
    one shape. The loss counts prefix positions from ``loss_start`` on; rollouts that end before are
    in no microbatch. Where rollouts are of several domains, each microbatch holds those of one,
    and there are more than ``count`` if that takes more, a multiple of ``replicas``. ValueError
    where there is nothing to train on.
    """
    lengths = [sequence_length(rollout) for rollout in rollouts]
    loss_tokens = count_loss_tokens(rollouts, loss_start)
    if loss_tokens == 0:
        raise ValueError(nothing_to_train_on(rollouts, loss_start))
    members: list[list[int]] = []
    domains: list[str] = []
    scored = with_loss_tokens(rollouts, loss_start)
    for domain, share in _shares([rollouts[i] for i in scored], count, replicas).items():
        own = [index for index in scored if rollouts[index].domain == domain]
        members += _spread(own, lengths, share)
        domains += [domain] * share
    filled = max(sum(lengths[index] for index in chosen) for chosen in members)
    return MicrobatchPlan(
        members=tuple(tuple(sorted(chosen)) for chosen in members),
        tokens=-(-filled // multiple) * multiple,
        loss_tokens=loss_tokens,
        loss_start=loss_start,
        multiple=multiple,
        domains=tuple(domains) if any(domains) else (),
    )


def _spread(indices: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    members: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    capacity = -(-len(indices) // count)
    for index in sorted(indices, key=lambda i: -lengths[i]):
        open_ones = [m for m in range(count) if len(members[m]) < capacity]
        target = min(open_ones, key=lambda m: filled[m])
        members[target].append(index)
        filled[target] += lengths[index]
    return members


def _shares(rollouts: Sequence[Rollout], count: int, replicas: int) -> dict[str, int]:
    """Microbatches of each domain, none fuller than with ``count`` for all of one domain."""
    sizes = Counter(rollout.domain for rollout in rollouts)
    if len(sizes) == 1:
        return dict.fromkeys(sizes, count)
    capacity = -(-len(rollouts) // count)
    shares = {domain: -(-sizes[domain] // capacity) for domain in sorted(sizes)}
    while sum(shares.values()) % replicas:
        fullest = max(shares, key=lambda domain: sizes[domain] / shares[domain])
        shares[fullest] += 1
    return shares


def padded_for(
    context_ranks: int, rollouts: Sequence[Rollout], plan: MicrobatchPlan
) -> MicrobatchPlan:
    """``plan`` for a model that cuts a microbatch's tokens over ``context_ranks``.

    Each sequence ends in padding that makes it a multiple of twice as many (``context_shares.py``):
    causality keeps it from the tokens before it.
    """
    plan = replace(plan, context_ranks=context_ranks)
    return replace(plan, tokens=_tokens(rollouts, plan))


def _tokens(rollouts: Sequence[Rollout], plan: MicrobatchPlan) -> int:
    """T that holds the fullest microbatch."""
    filled = (sum(_padded_length(rollouts[i], plan) for i in m) for m in plan.members)
    multiple = math.lcm(plan.sequence_multiple, plan.context_ranks * plan.multiple)
    return -(-max(filled) // multiple) * multiple


def _padded_length(rollout: Rollout, plan: MicrobatchPlan) -> int:
    return -(-sequence_length(rollout) // plan.sequence_multiple) * plan.sequence_multiple


def as_teacher_reads(
    rollouts: Sequence[Rollout], plan: MicrobatchPlan
) -> tuple[Sequence[Rollout], MicrobatchPlan]:
    """The same prefixes after the teacher's own prompts, in the same microbatches.

    N and the order of the prefix positions stay, so what the teacher says of them goes with the
    student's positions one to one; T is the teacher's own.
    """
    if not any(rollout.teacher_prompt_ids for rollout in rollouts):
        return rollouts, plan
    theirs = [
        replace(rollout, prompt_ids=rollout.teacher_prompt_ids or rollout.prompt_ids)
        for rollout in rollouts
    ]
    return theirs, replace(plan, tokens=_tokens(theirs, plan))


def count_loss_tokens(rollouts: Sequence[Rollout], loss_start: int) -> int:
    """Prefix tokens that the loss counts."""
    return sum(max(len(rollout.prefix_ids) - loss_start, 0) for rollout in rollouts)


def with_loss_tokens(rollouts: Sequence[Rollout], loss_start: int) -> list[int]:
    """Indices of the rollouts that have a token in the loss."""
    return [i for i, rollout in enumerate(rollouts) if len(rollout.prefix_ids) > loss_start]


def nothing_to_train_on(rollouts: Sequence[Rollout], loss_start: int) -> str:
    """An error's words for rollouts without a token in the loss."""
    longest = max((len(rollout.prefix_ids) for rollout in rollouts), default=0)
    return (
        f"no prefix token from position {loss_start} on in {len(rollouts)} rollouts, the longest "
        f"of {longest} tokens: nothing to train on"
    )


def sequence_length(rollout: Rollout) -> int:
    """Tokens that are fed: the last sampled one predicts nothing."""
    return len(rollout.prompt_ids) + len(rollout.prefix_ids) - 1


def pack(
    rollouts: Sequence[Rollout], plan: MicrobatchPlan, microbatch: int, device: torch.device
) -> PrefixBatch:
    """Microbatch ``microbatch`` of ``plan`` as tensors on ``device``."""
    chosen = [rollouts[index] for index in plan.members[microbatch]]
    lengths = [_padded_length(rollout, plan) for rollout in chosen]
    longest = max(lengths, default=0) or plan.tokens
    lengths += _padding_lengths(plan.tokens - sum(lengths), longest)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.zeros(plan.tokens, np.int64)
    positions, ends, skipped = [], [], plan.loss_start
    for rollout, start in zip(chosen, starts[: len(chosen)], strict=True):
        sequence = _joined((rollout.prompt_ids, rollout.prefix_ids), np.int64)[:-1]
        ids[start : start + len(sequence)] = sequence
        first = start + len(rollout.prompt_ids) - 1
        positions.append(np.arange(first + skipped, first + len(rollout.prefix_ids)))
        if rollout.finish_reason == "stop":
            ends.append(sum(map(len, positions)) - 1)
    prefix_positions = _joined(positions, np.int64)
    weight = np.full(len(prefix_positions), 1.0 / plan.loss_tokens, np.float32)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    return PrefixBatch(
        input_ids=tensor(ids),
        position_ids=tensor(_joined([np.arange(n) for n in lengths], np.int64)),
        cu_seqlens=tensor(starts.astype(np.int32)),
        max_seqlen=longest,
        prefix_positions=tensor(prefix_positions),
        ends=tensor(np.asarray(ends, np.int64)),
        labels=tensor(_joined([r.prefix_ids[skipped:] for r in chosen], np.int64)),
        token_weight=tensor(weight),
        rollout_logprobs=tensor(
            _joined([r.rollout_logprobs[skipped:] for r in chosen], np.float32)
        ),
        prefix_offsets=tensor(
            _joined([np.arange(skipped, len(r.prefix_ids)) for r in chosen], np.int64)
        ),
        domain=plan.domain(microbatch),
    )


def passages_of(
    rollouts: Sequence[Rollout], plan: MicrobatchPlan, microbatch: int
) -> list[Passage]:
    """What of a microbatch is scored, in the order of its prefix positions."""
    chosen = (rollouts[index] for index in plan.members[microbatch])
    return [
        Passage((*each.prompt_ids, *each.prefix_ids), len(each.prompt_ids) + plan.loss_start)
        for each in chosen
    ]


def prefix_count(rollouts: Sequence[Rollout], plan: MicrobatchPlan, microbatch: int) -> int:
    """N of a microbatch, without building it."""
    chosen = [rollouts[index] for index in plan.members[microbatch]]
    return count_loss_tokens(chosen, plan.loss_start)


def _padding_lengths(padding: int, longest: int) -> list[int]:
    """Padding as sequences no longer than real ones: attention is quadratic in a sequence."""
    whole, rest = divmod(padding, longest)
    return [longest] * whole + ([rest] if rest else [])


def _joined(parts: Sequence[Sequence[float] | np.ndarray], dtype: type) -> np.ndarray:
    if not parts:
        return np.zeros(0, dtype)
    return np.concatenate([np.asarray(part, dtype) for part in parts])
