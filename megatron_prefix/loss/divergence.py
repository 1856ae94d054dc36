"""The mathematics of one chunk: statistics, their merge over ranks, values, logit gradients.

Legend: C positions, V this rank's real vocabulary rows, R tensor-parallel ranks;
x = student logits / temperature, y = teacher logits / temperature; p_s, p_t their softmaxes over
the whole vocabulary; m_s, m_t the maxima of x and y, S = sum exp(x - m_s), T = sum exp(y - m_t),
delta = (x - m_s) - (y - m_t), X = sum exp(x - m_s) delta (reverse) or sum exp(y - m_t) (-delta)
(forward). A rank's own m, S, T and X come from its own shard alone; merging shifts them.

Statistics travel and merge in fp64: five numbers a token cost nothing beside V logits, and
X/S - ln S + ln T loses digits of a small divergence.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_S, SUM_S, MAX_T, SUM_T, CROSS = range(5)
STATISTICS = 5
MIXTURE_STATISTICS = 2

# Maximum of a shard without a real row: finite, because -inf - -inf is NaN.
EMPTY_MAX = -1e30


@dataclass(frozen=True)
class Divergence:
    """``name``: reverse_kl KL(student||teacher), forward_kl KL(teacher||student), relaxed_kl (see
    ``relaxed.py``; ``beta`` is its lambda) or jsd, the
    Jensen-Shannon divergence beta KL(teacher||M) + (1-beta) KL(student||M) to the mixture
    M = beta teacher + (1-beta) student. No factor temperature**2 is applied."""

    name: str
    beta: float
    temperature: float

    @property
    def teacher_log_odds(self) -> float:
        """logit(beta); 0 where beta has no meaning."""
        if self.name != "jsd":
            return 0.0
        return math.log(self.beta) - math.log1p(-self.beta)


@dataclass(frozen=True)
class Merged:
    """Whole-vocabulary statistics as this rank uses them; every field fp64 [C]."""

    sum_s: Tensor  # S
    sum_t: Tensor  # T
    cross: Tensor  # X
    own_max_s: Tensor  # of this rank's shard
    own_max_t: Tensor
    scale_s: Tensor  # exp(own m_s - m_s) / S: own exp(x - m_s) times it is p_s
    scale_t: Tensor
    shift: Tensor  # added to this rank's own delta gives delta
    offset: Tensor  # a = (y - own m_t) - (x - own m_s) + offset; of jsd

    @property
    def log_ratio(self) -> Tensor:
        return self.sum_s.log() - self.sum_t.log()


@dataclass(frozen=True)
class GradientFactors:
    """What a token's logit gradient takes, with this rank's exponentials e_s and e_t;
    every field fp32 [C].

    reverse: e_s (own delta + second) first; forward: e_s first - e_t second;
    jsd: e_s (softplus(a) + second) first.
    """

    first: Tensor
    second: Tensor
    max_s: Tensor  # these for kernels that keep raw logits until the gradient
    max_t: Tensor
    offset: Tensor


@dataclass(frozen=True)
class WholeRows:
    """What the passes make of C tokens where one rank holds the whole vocabulary."""

    statistics: Tensor  # fp64 [C, 5]
    values: Tensor  # fp64 [C], the divergence of each token
    gradient: Tensor  # [C, V], to the student's logits; of no meaning where none was wanted


def empty_statistics(logits: Tensor) -> Tensor:
    """Statistics, fp64 [C, 5], of a shard without a real row; on ``logits``.device."""
    result = logits.new_zeros((logits.shape[0], STATISTICS), dtype=torch.float64)
    result[:, MAX_S] = result[:, MAX_T] = EMPTY_MAX
    return result


def merge_statistics(gathered: Tensor, rank: int, divergence: Divergence) -> Merged:
    """``gathered`` fp64 [R, C, >=5] in rank order, the same on all ranks."""
    above_s = gathered[..., MAX_S] - gathered[..., MAX_S].amax(0)
    above_t = gathered[..., MAX_T] - gathered[..., MAX_T].amax(0)
    own_s, own_t, shift = above_s.exp(), above_t.exp(), above_s - above_t
    if divergence.name == "reverse_kl":
        cross = own_s * (gathered[..., CROSS] + gathered[..., SUM_S] * shift)
    else:
        cross = own_t * (gathered[..., CROSS] - gathered[..., SUM_T] * shift)
    sum_s = (own_s * gathered[..., SUM_S]).sum(0)
    sum_t = (own_t * gathered[..., SUM_T]).sum(0)
    return Merged(
        sum_s=sum_s,
        sum_t=sum_t,
        cross=cross.sum(0),
        own_max_s=gathered[rank, :, MAX_S],
        own_max_t=gathered[rank, :, MAX_T],
        scale_s=own_s[rank] / sum_s,
        scale_t=own_t[rank] / sum_t,
        shift=shift[rank],
        offset=sum_s.log() - sum_t.log() - shift[rank] + divergence.teacher_log_odds,
    )


def token_values(merged: Merged, mixture: Tensor | None, divergence: Divergence) -> Tensor:
    """The divergence of each token, fp64 [C]; ``mixture`` fp64 [C, 2] over all ranks, for jsd."""
    if divergence.name == "reverse_kl":
        return merged.cross / merged.sum_s - merged.log_ratio
    if divergence.name == "forward_kl":
        return merged.cross / merged.sum_t + merged.log_ratio
    assert mixture is not None
    return mixture[:, 1]


def gradient_factors(
    merged: Merged, mixture: Tensor | None, token_weight: Tensor, divergence: Divergence
) -> GradientFactors:
    """``mixture`` as for :func:`token_values`; ``token_weight`` fp32 [C]."""
    weight = token_weight.double() / divergence.temperature
    first, second = merged.scale_s * weight, merged.scale_t * weight
    if divergence.name == "reverse_kl":
        second = merged.shift - merged.cross / merged.sum_s
    elif divergence.name == "jsd":
        assert mixture is not None
        first, second = -(1 - divergence.beta) * first, -mixture[:, 0]
    return GradientFactors(
        first=first.float(),
        second=second.float(),
        max_s=merged.own_max_s.float(),
        max_t=merged.own_max_t.float(),
        offset=merged.offset.float(),
    )
