"""The elementwise passes of a chunk in plain torch, in place, for any device.

Legend: C positions, V this rank's real vocabulary rows; see ``divergence.py`` for the symbols.

A pass is many torch operations, so it walks the chunk in blocks of rows that stay in a core's
cache. Each pass leaves in the two buffers what the next one needs:

| pass | reverse_kl | forward_kl | jsd |
|---|---|---|---|
| statistics | exp(x - m_s), delta | exp(x - m_s), exp(y - m_t) | x - m_s, y - m_t |
| mixture | | | p_s, softplus(a) |
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
    Merged,
    WholeRows,
    empty_statistics,
    gradient_factors,
    merge_statistics,
    mixture_offset,
    token_values,
)

# Two buffers and a temporary of this size stay in a 2 MiB second-level cache.
_CPU_BLOCK_BYTES = 256 << 10
_GPU_BLOCK_BYTES = 64 << 20


def one_rank(
    student: Tensor, teacher: Tensor, token_weight: Tensor | None, divergence: Divergence
) -> WholeRows:
    """All passes at once, where this rank holds the whole vocabulary.

    ``token_weight`` fp32 [C], or None where no gradient is wanted.
    """
    all_statistics = empty_statistics(student)
    values = all_statistics.new_empty(student.shape[0])
    for rows in row_blocks(student):
        x, y = student[rows], teacher[rows]
        all_statistics[rows] = statistics(x, y, divergence)
        merged = merge_statistics(all_statistics[None, rows], 0, divergence)
        sums = mixture(x, y, merged, divergence) if divergence.name == "jsd" else None
        values[rows] = token_values(merged, sums, divergence)
        if token_weight is not None:
            factors = gradient_factors(merged, sums, token_weight[rows], divergence)
            logit_gradient(x, y, *factors, divergence)
    return WholeRows(all_statistics, values, student)


def statistics(student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor:
    """This rank's ``m_s, S, m_t, T, X`` of each token, fp64 [C, 5], from raw logits [C, V]."""
    result = empty_statistics(student)
    for rows in row_blocks(student):
        _block_statistics(student[rows], teacher[rows], divergence, result[rows])
    return result


def _block_statistics(x: Tensor, y: Tensor, divergence: Divergence, result: Tensor) -> None:
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


def mixture(student: Tensor, teacher: Tensor, merged: Merged, divergence: Divergence) -> Tensor:
    """This rank's share of K and of the divergence, fp64 [C, 2], for jsd alone.

    With a = ln p_t - ln p_s + logit(beta) and sp = softplus, K = sum p_s sp(a) and the value is
    -(1-beta) sum p_s (sp(a) + ln(1-beta)) - beta sum p_t (sp(-a) + ln(beta)): both brackets
    vanish where the two agree, and sp keeps its digits where they are far apart.
    """
    result = student.new_zeros((student.shape[0], MIXTURE_STATISTICS), dtype=torch.float64)
    offset = mixture_offset(merged, divergence).float()[:, None]
    scale_s, scale_t = merged.scale_s.float()[:, None], merged.scale_t.float()[:, None]
    for rows in row_blocks(student):
        x, y = student[rows], teacher[rows]
        log_odds = (y - x).add_(offset[rows])
        p_s, p_t = x.exp_().mul_(scale_s[rows]), y.exp_().mul_(scale_t[rows])
        _block_mixture(log_odds, p_s, p_t, divergence, result[rows])
    return result


def _block_mixture(
    log_odds: Tensor, p_s: Tensor, p_t: Tensor, divergence: Divergence, result: Tensor
) -> None:
    beta = divergence.beta
    # softplus(a) from softplus(-a) + a would lose the small one of the two.
    common = log_odds.abs().neg_().exp_().log1p_()
    from_teacher = relu(-log_odds).add_(common).add_(math.log(beta))
    softplus = log_odds.relu_().add_(common)
    result[:, 0] = _row_dot(p_s, softplus)
    from_student = torch.add(softplus, math.log1p(-beta), out=common)
    result[:, 1] = -(1 - beta) * _row_dot(p_s, from_student) - beta * _row_dot(p_t, from_teacher)
    p_t.copy_(softplus)


def logit_gradient(
    student: Tensor,
    teacher: Tensor,
    first: Tensor,
    second: Tensor,
    divergence: Divergence,
) -> Tensor:
    """Turns ``student`` into the gradient to the student's logits, fp32 [C, V], and returns it.

    ``first`` and ``second`` are :func:`~megatron_prefix.loss.divergence.gradient_factors`.
    """
    for rows in row_blocks(student):
        x, y = student[rows], teacher[rows]
        a, b = first[rows, None], second[rows, None]
        if divergence.name == "forward_kl":
            x.mul_(a).sub_(y.mul_(b))
        else:
            x.mul_(y.add_(b)).mul_(a)
    return student


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
