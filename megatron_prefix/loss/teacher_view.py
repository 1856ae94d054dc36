"""What the teacher thinks of the sampled tokens, before any loss: one pass over its LM head.

Legend: N prefix positions, C positions of a chunk, V this rank's real vocabulary rows, R
tensor-parallel ranks. Each rank emits four numbers a token, gathered once a chunk: its largest and
second largest logit, sum exp(z - largest), and the label's logit where it holds it.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prefix.loss import gemm
from megatron_prefix.loss.gather import all_gather
from megatron_prefix.loss.task import CPU_LIMITS, GPU_LIMITS, chosen_chunk

_FIRST, _SECOND, _SUM, _LABEL = range(4)


@dataclass(frozen=True)
class TeacherView:
    """fp64, the same on all ranks of the tensor-parallel group, at temperature 1."""

    label_logprobs: Tensor  # [N] of the sampled tokens; NaN off the vocabulary
    margin: Tensor  # [N], ln p of its likeliest token over that of its second likeliest


@torch.no_grad()
def teacher_view(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    tp_group: ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> TeacherView:
    """``hidden [N, d_t]`` and ``labels`` int64 [N] alike on all ranks of the group, ``weight
    [V/R, d_t]`` this rank's rows. Costs one of the loss's GEMMs; logits exist for C positions at a
    time."""
    first_row = 0 if tp_group is None else dist.get_rank(tp_group) * weight.shape[0]
    real = weight[: min(max(vocab_size - first_row, 0), weight.shape[0])]
    limits = GPU_LIMITS if hidden.is_cuda else CPU_LIMITS
    size = chunk_size or chosen_chunk(len(hidden), weight.shape[0], limits)
    label_logprobs, margin = (hidden.new_empty(len(hidden), dtype=torch.float64) for _ in "ab")
    for at in range(0, len(hidden), size):
        rows = slice(at, min(at + size, len(hidden)))
        logits = hidden.new_empty((rows.stop - at, len(real)), dtype=torch.float32)
        gemm.logits_into(logits, hidden[rows], real)
        own = _statistics(logits, labels[rows] - first_row)
        label_logprobs[rows], margin[rows] = _merge(all_gather(own, tp_group))
    inside = (labels >= 0) & (labels < vocab_size)
    return TeacherView(label_logprobs.where(inside, torch.nan), margin)


def _statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """fp64 [C, 4]; a shard of padding alone has nothing, and one of one row no second."""
    rows = logits.new_full((logits.shape[0], 4), -torch.inf, dtype=torch.float64)
    rows[:, _SUM] = 0.0
    if not logits.shape[1]:
        return rows
    top = logits.topk(min(2, logits.shape[1]), dim=1).values
    rows[:, _FIRST : _FIRST + top.shape[1]] = top.double()
    held = (labels >= 0) & (labels < logits.shape[1])
    picked = logits.gather(1, labels.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    rows[:, _LABEL] = picked.double().where(held, -torch.inf)
    rows[:, _SUM] = logits.sub_(top[:, :1]).exp_().sum(1, dtype=torch.float64)
    return rows


def _merge(everyone: Tensor) -> tuple[Tensor, Tensor]:
    """Label log-probabilities and margins, [C] each, from [R, C, 4] in rank order."""
    largest = everyone[..., _FIRST].amax(0)
    total = ((everyone[..., _FIRST] - largest).exp() * everyone[..., _SUM]).sum(0)
    label = everyone[..., _LABEL].amax(0)
    best = everyone[..., : _SECOND + 1].permute(1, 0, 2).flatten(1).topk(2, dim=1).values
    return label - largest - total.log(), best[:, 0] - best[:, 1]
