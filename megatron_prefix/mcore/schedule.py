"""Runs Megatron's pipeline schedules with this project's groups: no pipelining, or 1F1B."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_without_interleaving,
)
from torch import Tensor

from megatron_prefix.context_shares import share_of
from megatron_prefix.mcore.model import MegatronModel, forward_trunk
from megatron_prefix.types import PrefixBatch

OnPrefix = Callable[[PrefixBatch, Tensor, Tensor | None], Tensor]


def run_schedule(
    model: MegatronModel,
    module: torch.nn.Module,
    batches: Sequence[PrefixBatch],
    on_prefix: OnPrefix,
    *,
    forward_only: bool,
) -> list[Tensor]:
    """Run all ``batches`` through the pipeline; collective over this replica's ranks.

    ``on_prefix(batch, hidden [N, H], head_weight)`` is called on the last stage, microbatches in
    order; of a model that is cut over context-parallel ranks, with this rank's share of each. With
    ``forward_only`` its results are returned there. Otherwise it gives the scalar loss of the
    microbatch, already weighted over the whole step, which is backpropagated as it is, and an empty
    list is returned. Every batch must have the same T.
    """
    if not batches:
        return []

    groups = model.groups

    def forward_step(it: Iterator[PrefixBatch], module: torch.nn.Module) -> tuple[Tensor, Any]:
        batch = share_of(next(it), groups.cp_rank, groups.layout.cp)

        def at_prefix(hidden: Tensor, weight: Tensor | None) -> Tensor:
            return on_prefix(batch, hidden, weight)

        output = forward_trunk(model, module, batch, at_prefix)
        return output, (_collect if forward_only else _whole_loss)

    arguments: dict[str, Any] = {
        "forward_step_func": forward_step,
        "data_iterator": iter(batches),
        "model": module,
        "num_microbatches": len(batches),
        "seq_length": batches[0].input_ids.numel(),
        "micro_batch_size": 1,  # a packed microbatch is one row
        "forward_only": forward_only,
        "collect_non_loss_data": forward_only,
        "pg_collection": groups.pg,
    }
    if groups.layout.pp == 1:
        results = forward_backward_no_pipelining(**arguments)
    else:
        results = forward_backward_pipelining_without_interleaving(
            **arguments, p2p_communicator=P2PCommunicator(groups.pg.pp, model.config)
        )
    return results if forward_only and groups.is_last_stage else []


def _collect(output: Tensor, non_loss_data: bool = False) -> Tensor:
    return output


def _whole_loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    # Three values under calculate_per_token_loss keep Megatron from dividing by anything.
    return output, torch.zeros((), dtype=torch.int), {}
