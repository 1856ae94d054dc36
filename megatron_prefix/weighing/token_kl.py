"""The divergence of each rollout's own tokens, brought together on every rank."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.batch import MicrobatchPlan, count_loss_tokens
from megatron_prefix.mcore.groups import ModelGroups
from megatron_prefix.types import Rollout


def by_rollout(
    groups: ModelGroups,
    plan: MicrobatchPlan,
    rollouts: Sequence[Rollout],
    own: Sequence[Tensor],
    device: torch.device,
) -> list[np.ndarray]:
    """fp32 [L_i - loss_start] of each rollout, from the KL [N] of this rank's microbatches.

    ``own`` is empty off the last stage, ``device`` the collectives'. Collective over the
    student's ranks.
    """
    lengths = [count_loss_tokens([rollout], plan.loss_start) for rollout in rollouts]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    flat = torch.zeros(int(starts[-1]), dtype=torch.float32, device=device)
    if groups.counts:
        mine = plan.of_replica(groups.dp_rank, groups.layout.dp)
        for microbatch, kl in zip(mine, own, strict=True):
            places = [np.arange(starts[i], starts[i + 1]) for i in plan.members[microbatch]]
            index = np.concatenate(places) if places else np.zeros(0, np.int64)
            flat[torch.from_numpy(index).to(device)] = kl.float()
    dist.all_reduce(flat)
    return np.split(flat.cpu().numpy(), starts[1:-1])
