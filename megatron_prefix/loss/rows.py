"""One chunk on its way from the student's logits to their gradient, whatever the teacher gave.

Legend: C positions of the chunk, V real vocabulary rows of this rank's shard, R tensor-parallel
ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor

from megatron_prefix.loss.divergence import (
    WholeRows,
    gradient_factors,
    merge_statistics,
    token_values,
)
from megatron_prefix.loss.kernels import Kernels, Logits


class Rows(ABC):
    """The calls of one chunk, in order; between them the caller gathers over the ranks.

    The student's raw logits are in their buffer, fp32 [C, V], before the first call.
    """

    @abstractmethod
    def statistics(self) -> Tensor:
        """This rank's, fp64 [C, >=5], with ``MAX_S`` and ``SUM_S`` in their columns."""

    @abstractmethod
    def merge(self, gathered: Tensor) -> Tensor | None:
        """Takes everyone's statistics, fp64 [R, C, >=5]; returns this rank's share of what jsd
        sums up next, fp64 [C, 2], or None for a divergence that needs nothing more."""

    @abstractmethod
    def values(self, sums: Tensor | None) -> Tensor:
        """fp64 [C], the divergence of each token; ``sums`` of what ``merge`` returned."""

    @abstractmethod
    def gradient(self, sums: Tensor | None, token_weight: Tensor) -> Tensor:
        """To the student's raw logits, [C, V]; ``token_weight`` fp32 [C]."""

    def one_rank(self, token_weight: Tensor | None) -> WholeRows:
        """All at once, on the one rank there is; without a gradient where there is no weight."""
        statistics = self.statistics()
        sums = self.merge(statistics[None])
        values = self.values(sums)
        gradient = values if token_weight is None else self.gradient(sums, token_weight)
        return WholeRows(statistics, values, gradient)


class FullRows(Rows):
    """The teacher's hidden states and LM head: both distributions are known whole."""

    def __init__(
        self, kernels: Kernels, logits: Logits, fill_teacher: Callable[[], None], rank: int
    ) -> None:
        """``fill_teacher`` writes the teacher's raw logits into their place in ``logits``."""
        self._kernels, self._logits = kernels, logits
        self._fill_teacher, self._rank = fill_teacher, rank

    def statistics(self) -> Tensor:
        self._fill_teacher()
        return self._kernels.statistics(self._logits)

    def merge(self, gathered: Tensor) -> Tensor | None:
        divergence = self._logits.divergence
        self._merged = merge_statistics(gathered, self._rank, divergence)
        if divergence.name != "jsd":
            return None
        return self._kernels.mixture(self._logits, self._merged)

    def values(self, sums: Tensor | None) -> Tensor:
        return token_values(self._merged, sums, self._logits.divergence)

    def gradient(self, sums: Tensor | None, token_weight: Tensor) -> Tensor:
        factors = gradient_factors(self._merged, sums, token_weight, self._logits.divergence)
        return self._kernels.logit_gradient(self._logits, factors)

    def one_rank(self, token_weight: Tensor | None) -> WholeRows:
        self._fill_teacher()
        return self._kernels.one_rank(self._logits, token_weight)
