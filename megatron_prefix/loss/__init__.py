"""Divergences over tensor-parallel LM heads: of the whole vocabulary, or of a teacher's top k.

Torch and a process group that is handed in; neither Megatron nor global parallel state.
"""

from megatron_prefix.loss.buffers import Workspace
from megatron_prefix.loss.checks import check_top_k_values
from megatron_prefix.loss.finite import FiniteCheck, check_finite
from megatron_prefix.loss.vocab_parallel import (
    DivergenceResult,
    prefix_cross_entropy,
    prefix_divergence,
    top_k_divergence,
    vocab_parallel_kl,
)

__all__ = [
    "DivergenceResult",
    "FiniteCheck",
    "Workspace",
    "check_finite",
    "check_top_k_values",
    "prefix_cross_entropy",
    "prefix_divergence",
    "top_k_divergence",
    "vocab_parallel_kl",
]
