"""How much each prefix token counts, from what the teacher made of the rollout up to it. Pure.

Computed once a rollout is scored, so none of this saves sampling: it moves the loss, as a window
of each rollout's own, and not the length. Legend: N prefix positions of a microbatch, rollouts one
after another.
"""

import math

import torch
from torch import Tensor

from megatron_prefix.config import TokenWeightConfig


def raw_weights(
    config: TokenWeightConfig,
    offsets: Tensor,  # int64 [N], rising by 1 within a rollout
    student_logprobs: Tensor,  # [N] of the sampled tokens; NaN where no server sampled them
    teacher_logprobs: Tensor,  # fp64 [N] of the same
    margin: Tensor,  # fp64 [N]
) -> Tensor:
    """fp64 [N], above 0 for the first token of each rollout, and to be divided by their sum."""
    starts = rollout_starts(offsets)
    if not starts:
        return torch.zeros_like(margin)
    if config.rule == "discrepancy":
        drift = student_logprobs.double() - teacher_logprobs
        drift = drift.where(~student_logprobs.isnan(), 0.0)  # a written text has not drifted
        return discrepancy_weights(drift, starts, config.scale, config.floor)
    kept = torch.ones_like(margin)
    for start, end in zip(starts, [*starts[1:], len(offsets)], strict=True):
        kept[start + change_point(margin[start:end], config.min_tokens, config.strength) : end] = 0
    return kept


def rollout_starts(offsets: Tensor) -> list[int]:
    """Where each rollout's positions begin in [N]."""
    if not len(offsets):
        return []
    inside = (offsets[1:] - offsets[:-1]) == 1
    return [0, *((~inside).nonzero()[:, 0] + 1).tolist()]


def discrepancy_weights(drift: Tensor, starts: list[int], scale: float, floor: float) -> Tensor:
    """``max(floor, exp(-max(c_t, 0) / scale))`` with ``c_t`` the sum of ``drift`` before token t.

    ``drift``: ln p_student - ln p_teacher of the sampled tokens, [N]. A rollout's first token
    weighs 1; a token at which the teacher finds what was written e^scale times less likely than
    the student did, 1/e. In the spirit of arXiv 2606.22600, which weighs tokens by the accumulated
    discrepancy; this formula is ours.
    """
    sums = drift.cumsum(0) - drift  # of all tokens before
    lengths = torch.tensor([*starts[1:], len(drift)], device=drift.device)
    first = torch.tensor(starts, device=drift.device)
    begun = sums[first].repeat_interleave(lengths - first)
    return (-(sums - begun).clamp(min=0.0) / scale).exp().clamp(min=floor)


def reward_weights(student_logprobs: Tensor, teacher_logprobs: Tensor, mixture: float) -> Tensor:
    """fp64 [N]: 1 where ln p_teacher - ln p_student is at least ln(mixture / (1 - mixture)), or 0.

    The tokens of the exploring phase of relaxed on-policy distillation (arXiv 2603.11137), as
    others report it: those whose reward is not clipped. Text that no server sampled weighs 1.
    """
    reward = teacher_logprobs - student_logprobs.double()
    clipped = reward < math.log(mixture) - math.log1p(-mixture)
    return (~clipped | student_logprobs.isnan()).double()


def change_point(signal: Tensor, least: int, strength: float) -> int:
    """Tokens before the one downward shift of ``signal``'s mean; all of them where there is none.

    Two means against one, with one variance, by the Bayesian information criterion: a shift at k
    must win n ln(RSS_1 / RSS_2) > strength * 2 ln n (a second mean, and where). Each side has at
    least ``least`` tokens. In the spirit of arXiv 2605.13643, which tests the teacher's margin over
    the student's likeliest tokens, by sentence; here it is that over the whole vocabulary, by
    token.
    """
    n = len(signal)
    if n < 2 * least:
        return n
    places = torch.arange(least, n - least + 1, device=signal.device)
    centred = signal - signal.mean()
    before = centred.cumsum(0)[places - 1]  # the sum after is its opposite
    # By the split at k, the residuals lose before^2 (1/k + 1/(n - k)).
    gain = before.square() * (1.0 / places + 1.0 / (n - places))
    gain = gain.where(before > 0.0, -1.0)  # downward alone
    best = int(gain.argmax())
    whole, won = float(centred.square().sum()), float(gain[best])
    # What a constant signal differs by from its own mean is rounding, not a shift.
    rounding = 4.0 * torch.finfo(signal.dtype).eps * float(signal.abs().max())
    if won <= 0.0 or whole <= n * rounding**2:
        return n
    left = max(whole - won, 1e-12 * whole)
    criterion = n * torch.log(torch.tensor(whole / left, dtype=torch.float64))
    bar = strength * 2.0 * torch.log(torch.tensor(float(n), dtype=torch.float64))
    return int(places[best]) if criterion > bar else n
