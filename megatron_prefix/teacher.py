"""The teacher: hidden states of the student's prefix positions, brought to the student's ranks.

The LM head is not the teacher's to apply: it lies in the student's vocabulary shards, where the
divergence meets both (docs/architecture.md).
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.batch import MicrobatchPlan, pack, prefix_count
from megatron_prefix.layout import Layout
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.schedule import run_schedule
from megatron_prefix.types import PrefixBatch, Rollout, Targets, TeacherTargets


class Teacher(Protocol):
    """Anything that can score the student's prefixes."""

    def targets(self, rollouts: Sequence[Rollout], plan: MicrobatchPlan) -> Sequence[Targets]:
        """Targets of this rank's student microbatches, in order; empty off the last stage.

        Collective over the world.
        """


class ColocatedTeacher:
    """A Megatron teacher on the student's own ranks, in a layout of its own."""

    def __init__(self, model: MegatronModel, student: Layout, device: torch.device) -> None:
        self._model, self._student, self._device = model, student, device
        model.module.requires_grad_(False).eval()

    def targets(self, rollouts: Sequence[Rollout], plan: MicrobatchPlan) -> list[TeacherTargets]:
        groups = self._model.groups
        mine = range(groups.dp_rank, len(plan), groups.layout.dp)
        batches = [pack(rollouts, plan, m, self._device) for m in mine]
        hidden = self.hidden_states(batches)
        scored = dict(zip(mine, hidden, strict=True)) if groups.is_last_stage else {}
        return self._deliver(scored, rollouts, plan)

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[PrefixBatch]) -> list[Tensor]:
        """[N, d_t] of each microbatch on the last stage, empty elsewhere."""
        return run_schedule(
            self._model,
            self._model.module,
            batches,
            lambda batch, hidden, head: hidden,
            forward_only=True,
        )

    def _deliver(
        self, scored: dict[int, Tensor], rollouts: Sequence[Rollout], plan: MicrobatchPlan
    ) -> list[TeacherTargets]:
        """Each microbatch's hidden states from a teacher's last stage to a student's."""
        rank, per_rank = dist.get_rank(), len(plan) // self._student.dp
        width = self._model.hf.shape.hidden_size
        ops: list[dist.P2POp] = []
        received: list[Tensor] = []
        for m in range(len(plan)):
            senders = self._model.groups.layout.last_stage(m % self._model.groups.layout.dp)
            for index, receiver in enumerate(self._student.last_stage(m // per_rank)):
                sender = receiver if receiver in senders else senders[index % len(senders)]
                if rank == receiver and rank == sender:
                    received.append(scored[m])
                elif rank == sender:
                    ops.append(dist.P2POp(dist.isend, scored[m].contiguous(), receiver))
                elif rank == receiver:
                    size = (prefix_count(rollouts, plan, m), width)
                    buffer = torch.empty(
                        size, dtype=self._model.config.params_dtype, device=self._device
                    )
                    ops.append(dist.P2POp(dist.irecv, buffer, sender))
                    received.append(buffer)
        if ops:
            for work in dist.batch_isend_irecv(ops):
                work.wait()
        return [TeacherTargets(hidden) for hidden in received]
