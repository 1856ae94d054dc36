"""Reverse KL whose log-ratio is clipped where the teacher finds the student's token too unlikely.

On-policy distillation read as policy optimisation pays each token R = ln p_t - ln p_s; its negative
tail is heavy and moves the student most. Relaxed on-policy distillation (REOPOLD, arXiv 2603.11137)
holds R up to what a mixture of the two models with a share lambda allows,

    R' = max(R, ln(lambda / (1 - lambda))),

and lets no gradient through R'. It does so for the sampled token; here the expectation over the
student's distribution is taken whole, as everywhere in this loss:

    value = -sum_v p_s R'_v,   gradient to x_v = p_s (K - R'_v) w,   K = sum_v p_s R'_v,

the policy gradient of sum p_s R' with R' held fixed. It is not the derivative of the value: that
has another term where tokens are clipped. With lambda towards 0 both are those of reverse_kl.

Legend: C positions, V this rank's real vocabulary rows, R tensor-parallel ranks; x, y, m_s, m_t,
S, T as in ``divergence.py``, where ``beta`` is lambda. Clipping needs ln p_t and ln p_s themselves,
so the sums over ranks come second, as jsd's do.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_prefix.loss.divergence import (
    MAX_S,
    MAX_T,
    MIXTURE_STATISTICS,
    SUM_S,
    SUM_T,
    GradientFactors,
    empty_statistics,
    merge_statistics,
)
from megatron_prefix.loss.kernels import Logits
from megatron_prefix.loss.rows import Rows
from megatron_prefix.loss.torch_kernels import TorchKernels, row_blocks


class RelaxedRows(Rows):
    """In plain torch, on any device."""

    def __init__(self, logits: Logits, fill_teacher: Callable[[], None], rank: int) -> None:
        self._kernels, self._logits = TorchKernels(), logits
        self._fill_teacher, self._rank = fill_teacher, rank
        mixture = logits.divergence.beta
        self._floor = math.log(mixture) - math.log1p(-mixture)

    def statistics(self) -> Tensor:
        """Leaves x - m_s and y - m_t. Sums in fp64: no later difference takes their rounding out,
        as X/S - ln S does in reverse_kl."""
        self._fill_teacher()
        logits = self._logits
        result = empty_statistics(logits.student)
        for rows in row_blocks(logits.student):
            for values, maximum, total in (
                (logits.student[rows], MAX_S, SUM_S),
                (logits.teacher[rows], MAX_T, SUM_T),
            ):
                values.mul_(1 / logits.divergence.temperature)
                highest = values.amax(1, keepdim=True)
                result[rows, maximum] = highest[:, 0].double()
                result[rows, total] = values.sub_(highest).exp().sum(1, dtype=torch.float64)
        return result

    def merge(self, gathered: Tensor) -> Tensor | None:
        """This rank's share of K. R is own (y - m_t) - (x - m_s) + offset; the offset is added in
        fp64, for the value of two models that are close hangs on it."""
        merged = self._merged = merge_statistics(gathered, self._rank, self._logits.divergence)
        bound = (self._floor - merged.offset).float()
        student, teacher = self._logits.student, self._logits.teacher
        result = student.new_zeros((student.shape[0], MIXTURE_STATISTICS), dtype=torch.float64)
        for rows in row_blocks(student):
            x, y = student[rows], teacher[rows]
            torch.sub(y, x, out=y)
            torch.maximum(y, bound[rows, None], out=y)
            x.exp_()
            mass = x.sum(1, dtype=torch.float64)
            own = x.mul(y).sum(1, dtype=torch.float64) + merged.offset[rows] * mass
            result[rows, 0] = merged.scale_s[rows] * own
        return result

    def values(self, sums: Tensor | None) -> Tensor:
        assert sums is not None
        return -sums[:, 0]

    def gradient(self, sums: Tensor | None, token_weight: Tensor) -> Tensor:
        assert sums is not None
        merged, divergence = self._merged, self._logits.divergence
        first = -merged.scale_s * token_weight.double() / divergence.temperature
        second = (merged.offset - sums[:, 0]).float()
        unused = torch.zeros_like(second)
        factors = GradientFactors(first.float(), second, unused, unused, unused)
        return self._kernels.logit_gradient(self._logits, factors)
