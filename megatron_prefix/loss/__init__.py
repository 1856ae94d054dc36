"""Full-vocabulary divergences over tensor-parallel LM heads.

Torch and a process group that is handed in; neither Megatron nor global parallel state.
"""

from megatron_prefix.loss.buffers import Workspace
from megatron_prefix.loss.checks import check_finite
from megatron_prefix.loss.vocab_parallel import (
    DivergenceResult,
    prefix_divergence,
    vocab_parallel_kl,
)

__all__ = [
    "DivergenceResult",
    "Workspace",
    "check_finite",
    "prefix_divergence",
    "vocab_parallel_kl",
]
