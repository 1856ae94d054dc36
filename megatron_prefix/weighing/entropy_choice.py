"""Which tokens a step learns from, by the student's own entropy: one more forward pass.

Relaxed on-policy distillation (arXiv 2603.11137) trains on the tokens at which the student is least
sure, a share of the batch; tokens that it is sure of weigh nothing. Legend: N prefix positions of a
microbatch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.context_shares import of_all_shares
from megatron_prefix.loss.entropy import vocab_parallel_entropy
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.schedule import run_schedule
from megatron_prefix.student import Objective
from megatron_prefix.types import PrefixBatch


@dataclass(frozen=True)
class Chosen:
    batches: list[PrefixBatch]  # on the last stage with weights that sum to 1 over all ranks
    share: float  # of the step's tokens, those that weigh anything


@torch.no_grad()
def choose(
    model: MegatronModel, batches: Sequence[PrefixBatch], objective: Objective, share: float
) -> Chosen:
    """The ``share`` of all ranks' tokens with the highest entropy, rounded up, weighs evenly, the
    others nothing. Ties at the boundary are all in. Collective over the student's ranks."""
    own = _entropies(model, batches, objective)
    everyone = _of_all_ranks(torch.cat(own) if own and model.groups.counts else None, batches)
    wanted = math.ceil(share * len(everyone))
    least = everyone.sort(descending=True).values[wanted - 1]
    kept = int((everyone >= least).sum())
    weighted = [
        replace(batch, token_weight=((entropy >= least) / kept).float())
        for batch, entropy in zip(batches, own, strict=bool(own))
    ]
    return Chosen(weighted or list(batches), kept / len(everyone))


def _entropies(
    model: MegatronModel, batches: Sequence[PrefixBatch], objective: Objective
) -> list[Tensor]:
    """fp64 [N] of each microbatch, on the last stage; elsewhere none."""

    def entropy(batch: PrefixBatch, hidden: Tensor, head: Tensor | None) -> Tensor:
        assert head is not None
        own = vocab_parallel_entropy(
            hidden,
            head,
            vocab_size=model.hf.shape.vocab_size,
            tp_group=model.groups.pg.tp,
            chunk_size=objective.loss.chunk_size or None,
        )
        return of_all_shares(own, batch.rows, model.groups.pg.cp)

    model.module.eval()
    try:
        return run_schedule(model, model.module, batches, entropy, forward_only=True)
    finally:
        model.module.train()


def _of_all_ranks(own: Tensor | None, batches: Sequence[PrefixBatch]) -> Tensor:
    """fp64 [tokens of the step], on every rank in the same order; ``own`` None for a rank that
    holds a copy."""
    device = batches[0].input_ids.device
    values = torch.empty(0, dtype=torch.float64, device=device) if own is None else own
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in _ranks()]
    dist.all_gather(lengths, torch.tensor([len(values)], device=device))
    counts = [int(length) for length in lengths]
    padded = values.new_zeros(max(counts))
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _ranks() -> range:
    return range(dist.get_world_size())
