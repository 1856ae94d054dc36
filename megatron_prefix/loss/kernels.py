"""What elementwise kernels do for the loss; ``torch_kernels``, ``native_kernels`` (C++) and
``triton_kernels`` are three ways to do it, ``backends`` chooses.

Legend: C positions of a chunk, V this rank's real vocabulary rows (0 is possible); see
``divergence.py`` for the symbols.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_prefix.loss.divergence import (
    Divergence,
    GradientFactors,
    Merged,
    WholeRows,
    gradient_factors,
    merge_statistics,
    token_values,
)


@dataclass(frozen=True)
class Logits:
    """A chunk's logits, raw for the first pass; what a pass leaves in them is for the next pass of
    the same kernels alone."""

    student: Tensor  # contiguous fp32 [C, V]
    teacher: Tensor  # contiguous fp32 [C, V]
    divergence: Divergence
    gradient_dtype: torch.dtype  # which the GEMMs of the gradient will take

    def __getitem__(self, rows: slice) -> "Logits":
        return replace(self, student=self.student[rows], teacher=self.teacher[rows])


class Kernels(ABC):
    """The passes over a chunk's logits."""

    @abstractmethod
    def statistics(self, logits: Logits) -> Tensor:
        """This rank's ``m_s, S, m_t, T, X`` of each token, fp64 [C, 5]."""

    @abstractmethod
    def mixture(self, logits: Logits, merged: Merged) -> Tensor:
        """This rank's share of K and of the divergence, fp64 [C, 2], for jsd alone.

        With a = ln p_t - ln p_s + logit(beta) and sp = softplus, K = sum p_s sp(a) and the value
        is -(1-beta) sum p_s (sp(a) + ln(1-beta)) - beta sum p_t (sp(-a) + ln(beta)): both
        brackets vanish where the two agree, and sp keeps its digits where they are far apart.
        """

    @abstractmethod
    def logit_gradient(self, logits: Logits, factors: GradientFactors) -> Tensor:
        """The gradient to the student's raw logits [C, V], in ``logits.student`` itself or in a new
        tensor; in fp32 or, if that saves work, in ``logits.gradient_dtype``."""

    def one_rank(self, logits: Logits, token_weight: Tensor | None) -> WholeRows:
        """All passes, where this rank holds the whole vocabulary (V > 0).

        ``token_weight`` fp32 [C], or None where no gradient is wanted.
        """
        divergence = logits.divergence
        statistics = self.statistics(logits)
        merged = merge_statistics(statistics[None], 0, divergence)
        sums = self.mixture(logits, merged) if divergence.name == "jsd" else None
        gradient = logits.student
        if token_weight is not None:
            factors = gradient_factors(merged, sums, token_weight, divergence)
            gradient = self.logit_gradient(logits, factors)
        return WholeRows(statistics, token_values(merged, sums, divergence), gradient)
