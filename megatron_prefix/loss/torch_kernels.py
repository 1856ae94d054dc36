"""The elementwise passes of a chunk in plain torch, in place, for any device.

Legend: C positions, V this rank's real vocabulary rows; see ``divergence.py`` for the symbols.

A pass is many torch operations, so it walks the chunk in blocks of rows that stay in a core's
cache. Each pass leaves in the two buffers what the next one needs (here and in C++):

| pass | reverse_kl | forward_kl | jsd |
|---|---|---|---|
| statistics | exp(x - m_s), delta | exp(x - m_s), exp(y - m_t) | x - m_s, y - m_t |
| mixture | | | exp(x - m_s), softplus(a) |
| logit_gradient | the gradient | the gradient | the gradient |

(all with this rank's own maxima; the gradient lies in the student's buffer).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import relu

from megatron_prefix.loss.divergence import (
    CROSS,
    MAX_S,
    MAX_T,
    MIXTURE_STATISTICS,
    SUM_S,
    SUM_T,
    Divergence,
    GradientFactors,
    Merged,
    WholeRows,
    empty_statistics,
)
from megatron_prefix.loss.kernels import Kernels, Logits

# Two buffers and a temporary of this size stay in a 2 MiB second-level cache.
_CPU_BLOCK_BYTES = 512 << 10
_GPU_BLOCK_BYTES = 64 << 20


class TorchKernels(Kernels):
    def one_rank(self, logits: Logits, token_weight: Tensor | None) -> WholeRows:
        """Block by block through all passes, while the block is in cache."""
        statistics = empty_statistics(logits.student)
        values = statistics.new_empty(statistics.shape[0])
        for rows in row_blocks(logits.student):
            weight = None if token_weight is None else token_weight[rows]
            block = super().one_rank(logits[rows], weight)
            statistics[rows], values[rows] = block.statistics, block.values
        return WholeRows(statistics, values, logits.student)

    def statistics(self, logits: Logits) -> Tensor:
        result = empty_statistics(logits.student)
        for rows in row_blocks(logits.student):
            _block_statistics(logits[rows], result[rows])
        return result

    def mixture(self, logits: Logits, merged: Merged) -> Tensor:
        student, teacher, divergence = logits.student, logits.teacher, logits.divergence
        result = student.new_zeros((student.shape[0], MIXTURE_STATISTICS), dtype=torch.float64)
        for rows in row_blocks(student):
            x, y = student[rows], teacher[rows]
            log_odds = (y - x).add_(merged.offset[rows, None].float())
            sums = _block_mixture(log_odds, x.exp_(), y.exp_(), merged, rows, divergence)
            result[rows, 0], result[rows, 1] = sums
            y.copy_(log_odds)
        return result

    def logit_gradient(self, logits: Logits, factors: GradientFactors) -> Tensor:
        for rows in row_blocks(logits.student):
            x, y = logits.student[rows], logits.teacher[rows]
            first, second = factors.first[rows, None], factors.second[rows, None]
            if logits.divergence.name == "forward_kl":
                x.mul_(first).sub_(y.mul_(second))
            else:
                x.mul_(y.add_(second)).mul_(first)
        return logits.student


def _block_statistics(logits: Logits, result: Tensor) -> None:
    x, y, divergence = logits.student, logits.teacher, logits.divergence
    if divergence.temperature != 1.0:
        x.mul_(1 / divergence.temperature)
        y.mul_(1 / divergence.temperature)
    max_s, max_t = x.amax(1, keepdim=True), y.amax(1, keepdim=True)
    result[:, MAX_S], result[:, MAX_T] = max_s[:, 0], max_t[:, 0]
    x.sub_(max_s)
    y.sub_(max_t)
    if divergence.name == "reverse_kl":
        result[:, SUM_T] = y.exp().sum(1)
        torch.sub(x, y, out=y)
        result[:, SUM_S] = x.exp_().sum(1)
        result[:, CROSS] = _row_dot(x, y)
    elif divergence.name == "forward_kl":
        log_ratio = y - x
        result[:, SUM_S] = x.exp_().sum(1)
        result[:, SUM_T] = y.exp_().sum(1)
        result[:, CROSS] = _row_dot(y, log_ratio)
    else:
        result[:, SUM_S] = x.exp().sum(1)
        result[:, SUM_T] = y.exp().sum(1)
        result[:, CROSS] = 0.0


def _block_mixture(
    log_odds: Tensor,
    exp_s: Tensor,
    exp_t: Tensor,
    merged: Merged,
    rows: slice,
    divergence: Divergence,
) -> tuple[Tensor, Tensor]:
    """K and the value of each row; leaves softplus(a) in ``log_odds``."""
    beta = divergence.beta
    # softplus(a) from softplus(-a) + a would lose the small one of the two.
    common = log_odds.abs().neg_().exp_().log1p_()
    from_teacher = relu(-log_odds).add_(common).add_(math.log(beta))
    softplus = log_odds.relu_().add_(common)
    scale_s, scale_t = merged.scale_s[rows], merged.scale_t[rows]
    total = scale_s * _row_dot(exp_s, softplus)
    from_student = torch.add(softplus, math.log1p(-beta), out=common)
    value = -(1 - beta) * scale_s * _row_dot(exp_s, from_student)
    return total, value - beta * scale_t * _row_dot(exp_t, from_teacher)


def _row_dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Row ranges of ``matrix`` that a pass should take at once; none where it has no column."""
    if matrix.shape[1] == 0:
        return
    budget = _GPU_BLOCK_BYTES if matrix.is_cuda else _CPU_BLOCK_BYTES
    rows = max(1, budget // (matrix.shape[1] * matrix.element_size()))
    for at in range(0, matrix.shape[0], rows):
        yield slice(at, min(at + rows, matrix.shape[0]))
