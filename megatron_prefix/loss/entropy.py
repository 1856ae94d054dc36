"""How unsure a model is at each prefix position: the entropy of its next token, in one pass over
its LM head.

Legend: N prefix positions, C positions of a chunk, V this rank's real vocabulary rows, R
tensor-parallel ranks. Each rank emits three numbers a token, gathered once a chunk: its largest
logit m, S = sum exp(z - m) and E = sum exp(z - m) (z - m). Shifted to the largest m of all ranks
they add up, and the entropy is ln S - E / S.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prefix.loss import gemm
from megatron_prefix.loss.divergence import EMPTY_MAX
from megatron_prefix.loss.gather import all_gather
from megatron_prefix.loss.task import CPU_LIMITS, GPU_LIMITS, chosen_chunk


@torch.no_grad()
def vocab_parallel_entropy(
    hidden: Tensor,
    weight: Tensor,
    *,
    vocab_size: int,
    tp_group: ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """fp64 [N] in nats, at temperature 1, the same on all ranks of the group.

    ``hidden [N, d]`` alike on all of them, ``weight [V/R, d]`` this rank's rows. Costs one of the
    loss's GEMMs; logits exist for C positions at a time.
    """
    first_row = 0 if tp_group is None else dist.get_rank(tp_group) * weight.shape[0]
    real = weight[: min(max(vocab_size - first_row, 0), weight.shape[0])]
    limits = GPU_LIMITS if hidden.is_cuda else CPU_LIMITS
    size = chunk_size or chosen_chunk(len(hidden), weight.shape[0], limits)
    entropy = hidden.new_empty(len(hidden), dtype=torch.float64)
    for at in range(0, len(hidden), size):
        rows = slice(at, min(at + size, len(hidden)))
        logits = hidden.new_empty((rows.stop - at, len(real)), dtype=torch.float32)
        gemm.logits_into(logits, hidden[rows], real)
        entropy[rows] = _merge(all_gather(_statistics(logits), tp_group))
    return entropy


def _statistics(logits: Tensor) -> Tensor:
    """fp64 [C, 3]; overwrites the logits."""
    result = logits.new_zeros((logits.shape[0], 3), dtype=torch.float64)
    result[:, 0] = EMPTY_MAX
    if logits.shape[1]:
        maximum = logits.amax(1, keepdim=True)
        above = logits.sub_(maximum)
        exponentials = above.exp()
        result[:, 0] = maximum[:, 0].double()
        result[:, 1] = exponentials.sum(1, dtype=torch.float64)
        result[:, 2] = exponentials.mul_(above).sum(1, dtype=torch.float64)
    return result


def _merge(everyone: Tensor) -> Tensor:
    """[C] from [R, C, 3] in rank order."""
    shift = everyone[..., 0] - everyone[..., 0].amax(0)
    scale = shift.exp()
    total = (scale * everyone[..., 1]).sum(0)
    # An empty shard's shift is far below all others', and its sums are 0.
    cross = (scale * (everyone[..., 2] + everyone[..., 1] * shift)).sum(0)
    return total.log() - cross / total
