"""The loop. A step reads top to bottom in ``train_step``; ``assemble.py`` builds the parts."""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.agreement import Audit, audit_gradients
from megatron_prefix.batch import MicrobatchPlan, as_teacher_reads, pack
from megatron_prefix.conductor import Conductor
from megatron_prefix.config import Recipe
from megatron_prefix.mcore.checkpoint import Checkpointer
from megatron_prefix.mcore.export import export_hf
from megatron_prefix.mcore.optimizer import TrainableStudent, UpdateResult
from megatron_prefix.modes import asks_servers, probe_due
from megatron_prefix.orders import Order, microbatches, share_order
from megatron_prefix.phases import Phases
from megatron_prefix.reweigh import Weighted, reweigh
from megatron_prefix.student import Objective, PrefixSums, forward_backward, score
from megatron_prefix.teacher import Teacher
from megatron_prefix.token_kl import by_rollout
from megatron_prefix.types import PrefixBatch, StepMetrics, Targets

logger = logging.getLogger(__name__)


class Publisher(Protocol):
    """Brings the student's weights to whatever samples from them."""

    def prepare(self) -> None:
        """No rollout is wanted until the next ``publish`` or ``cancel``. Not collective."""

    def cancel(self) -> None:
        """Nothing will be published after all. Not collective."""

    def publish(self, version: int) -> None:
        """Collective over the world; returns when the servers hold ``version``."""


@dataclass(frozen=True)
class Parts:
    """What a trainer is made of; built alike on every rank but for the conductor."""

    student: TrainableStudent
    teacher: Teacher | None  # None: no step of the run asks it
    objective: Objective
    publisher: Publisher
    checkpointer: Checkpointer
    conductor: Conductor | None  # on rank 0
    host_group: dist.ProcessGroup  # gloo, for values that live on the host
    device: torch.device
    export_folder: Path  # of the trained student, as a Hugging Face folder
    token_multiple: int  # packed microbatches are padded to a multiple of this


class TrainingStopped(RuntimeError):
    """Too many non-finite steps in a row, or server and trainer disagree."""


class Trainer:
    """Runs a recipe from where its checkpoints are to its last step."""

    def __init__(self, recipe: Recipe, parts: Parts) -> None:
        self._recipe, self._parts = recipe, parts
        self._step = 0  # finished steps
        self._policy_version = self._published = 0
        self._skipped_in_a_row = 0
        self._saved_step = -1

    def train(self) -> bool:
        """Train to the last step; False where a signal ended the run early, its state saved."""
        self._restore()
        self._publish()
        if self._step == 0:
            self._probe_if_due()
        self._evaluate_if_due()
        while self._step < self._recipe.train.steps:
            phases = Phases(self._synchronize)
            with phases.phase("rollout"):
                order = share_order(self._decide, self._parts.host_group)
            if order.kind == "save_and_stop":
                self._save(wait=True)
                return False
            self.train_step(order, phases)
            self._after_step()
        self._save(wait=True)
        if self._recipe.checkpoint.export_hf:
            model = self._parts.student.model
            export_hf(model, self._parts.export_folder, model.config.params_dtype)
        share_order(lambda: Order("done"), self._parts.host_group)  # a teacher elsewhere waits
        return True

    def train_step(self, order: Order, phases: Phases) -> StepMetrics:
        """One step on the rollouts of ``order``, the same on every rank."""
        parts = self._parts
        plan = self._plan(order)
        if asks_servers(self._recipe, self._step + 1):
            parts.publisher.prepare()
        with phases.phase("teacher"):
            targets = None if order.supervised else self._targets(order, plan)
            weighted = self._weighted(self._own_batches(order, plan), targets)
        recalled: list[Tensor] | None = [] if self._recipe.prefix.recall.threshold else None
        with phases.phase("student"):
            sums = forward_backward(
                parts.student,
                weighted.batches,
                weighted.targets,
                parts.objective,
                order.prefix_length,
                recalled,
            )
            self._recall(order, plan, recalled)
        lr = parts.student.lr
        with phases.phase("optimizer"):
            update = self._update(sums)
        with phases.phase("sync"):
            self._sync(update)
        self._step += 1
        return self._report(order, sums, weighted, update, lr, phases)

    def _recall(self, order: Order, plan: MicrobatchPlan, own: list[Tensor] | None) -> None:
        if own is None or order.supervised:
            return
        kl = by_rollout(
            self._parts.student.model.groups, plan, order.rollouts, own, self._parts.device
        )
        if self._parts.conductor:
            self._parts.conductor.recall(order, kl)

    def _sync(self, update: UpdateResult) -> None:
        """The servers hold the newest weights whenever they are asked, and may lag until then."""
        self._policy_version += update.updated
        if not asks_servers(self._recipe, self._step + 1):
            return
        if self._published != self._policy_version:
            self._publish()
        else:
            self._parts.publisher.cancel()

    def _publish(self) -> None:
        self._parts.publisher.publish(self._policy_version)
        self._published = self._policy_version

    def _targets(self, order: Order, plan: MicrobatchPlan) -> Iterable[Targets]:
        assert self._parts.teacher is not None
        return self._parts.teacher.targets(*as_teacher_reads(order.rollouts, plan))

    def _plan(self, order: Order) -> MicrobatchPlan:
        return microbatches(order, self._recipe.train, self._parts.token_multiple)

    def _own_batches(self, order: Order, plan: MicrobatchPlan) -> list[PrefixBatch]:
        groups = self._parts.student.model.groups
        own = plan.of_replica(groups.dp_rank, groups.layout.dp)
        return [pack(order.rollouts, plan, m, self._parts.device) for m in own]

    def _weighted(self, batches: list[PrefixBatch], targets: Iterable[Targets] | None) -> Weighted:
        weights, parts = self._recipe.loss.weights, self._parts
        if targets is None or weights.rule == "uniform":
            return Weighted(batches, targets, effective_share=1.0)
        return reweigh(parts.student.model, batches, list(targets), parts.objective, weights)

    def _update(self, sums: PrefixSums) -> UpdateResult:
        if math.isfinite(sums.loss):
            return self._parts.student.update()
        self._parts.student.skip()
        return UpdateResult(grad_norm=math.nan, updated=False)

    def _report(
        self,
        order: Order,
        sums: PrefixSums,
        weighted: Weighted,
        update: UpdateResult,
        lr: float,
        phases: Phases,
    ) -> StepMetrics:
        sampled_version = self._policy_version - update.updated
        metrics = step_metrics(self._step, order, sums, update, lr, sampled_version)
        metrics = replace(metrics, effective_share=weighted.effective_share)
        if self._parts.conductor:
            metrics = self._parts.conductor.record(metrics, order, phases)
        self._stop_on_trouble(metrics, sums)
        return metrics

    def _stop_on_trouble(self, metrics: StepMetrics, sums: PrefixSums) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics.skipped else 0
        limit = self._recipe.train.max_skipped_steps
        if self._skipped_in_a_row >= limit:
            raise TrainingStopped(
                f"step {metrics.step}: {limit} steps in a row had a non-finite loss "
                f"({metrics.loss}) or gradient norm ({metrics.grad_norm}); the weights are those "
                f"of step {metrics.step - limit}; resume from the last checkpoint with a lower "
                f"optimizer.lr={self._recipe.optimizer.lr}"
            )
        rollout = self._recipe.rollout
        tolerance = rollout.logprob_tolerance
        # A replay may well be of other weights, and rollouts that lag are.
        on_policy = not rollout.replay and metrics.policy_lag == 0
        if on_policy and sums.worst.difference > tolerance:
            raise TrainingStopped(
                f"step {metrics.step}: a sampled token has log-probability {sums.worst.server:.6f} "
                f"on the server and {sums.worst.trainer:.6f} in the trainer; they may differ by "
                f"rollout.logprob_tolerance={tolerance}"
            )

    def _decide(self) -> Order:
        assert self._parts.conductor is not None
        return self._parts.conductor.order(self._step, self._policy_version)

    def _after_step(self) -> None:
        interval = self._recipe.checkpoint.save_interval
        self._parts.checkpointer.finalize()
        self._probe_if_due()  # before the save, which holds what the policy learns from it
        if interval and self._step % interval == 0:
            self._save(wait=False)
        self._evaluate_if_due()

    def _probe_if_due(self) -> None:
        """Full-length rollouts, scored and not trained on; the same decision on every rank."""
        if not probe_due(self._recipe, self._step):
            return
        parts = self._parts
        order = share_order(self._decide_probe, parts.host_group)
        if not order.rollouts:  # the student ended at once everywhere: there is nothing to score
            return
        audit = self._audit(order)
        if parts.conductor:
            kl, tokens = audit.sums.kl, audit.sums.tokens
            parts.conductor.record_probe(
                self._step, order, (kl / tokens).numpy(), tokens.numpy(), audit.agreement
            )

    def _audit(self, order: Order) -> Audit:
        """The probe's rollouts scored, and where the order asks for it, their gradients."""
        parts, plan, length = self._parts, self._plan(order), order.prefix_length
        batches = self._own_batches(order, plan)
        targets = self._targets(order, plan)
        if order.audit_length:
            both = list(targets)  # gone over twice
            return audit_gradients(
                parts.student, batches, both, parts.objective, length, order.audit_length
            )
        return Audit(score(parts.student, batches, targets, parts.objective, length), math.nan)

    def _decide_probe(self) -> Order:
        assert self._parts.conductor is not None
        return self._parts.conductor.probe_order(self._step, self._policy_version)

    def _evaluate_if_due(self) -> None:
        # The other ranks meanwhile wait in the next order's broadcast.
        if self._parts.conductor:
            self._parts.conductor.evaluate_if_due(self._step, self._policy_version)

    def _save(self, *, wait: bool) -> None:
        if self._saved_step == self._step:  # by its interval, just now
            self._parts.checkpointer.finalize(wait=wait)
            return
        state: dict[str, Any] = {"policy_version": self._policy_version}
        state["layout"] = self._parts.checkpointer.layout_record()
        if self._parts.conductor:
            state["conductor"] = self._parts.conductor.state_dict()
        self._parts.checkpointer.save(self._step, state, wait=wait)
        self._saved_step = self._step

    def _restore(self) -> None:
        restored = self._parts.checkpointer.restore()
        if restored is None:
            return
        self._step = self._saved_step = restored.step
        self._policy_version = restored.run_state["policy_version"]
        if self._parts.conductor:
            self._parts.conductor.resume(restored.step, restored.run_state["conductor"])
        logger.info("resumed after step %d from %s", restored.step, restored.folder.name)

    def _synchronize(self) -> None:
        if self._parts.device.type == "cuda":
            torch.cuda.synchronize()


def step_metrics(
    step: int,
    order: Order,
    sums: PrefixSums,
    update: UpdateResult,
    lr: float,
    sampled_version: int,
) -> StepMetrics:
    """What every rank knows of a step; rank 0 adds FLOPs and seconds."""
    rollouts = order.rollouts
    reached = sum(len(r.prefix_ids) >= order.prefix_length for r in rollouts)
    lags = [sampled_version - r.policy_version for r in rollouts if not r.written]
    return StepMetrics(
        step=step,
        loss=sums.loss,
        kl_by_position=(sums.kl / sums.tokens).numpy(),
        tokens_by_position=sums.tokens.long().numpy(),
        grad_norm=update.grad_norm,
        lr=lr,
        skipped=not update.updated,
        prefix_length=order.prefix_length,
        prefix_tokens=sum(len(r.prefix_ids) for r in rollouts),
        prompt_tokens=sum(len(r.prompt_ids) for r in rollouts),
        cut_fraction=reached / len(rollouts),
        cut_off_fraction=sum(r.finish_reason == "cut" for r in rollouts) / len(rollouts),
        policy_version=sampled_version,
        policy_lag=sum(lags) / max(len(lags), 1),
        logprob_diff_max=sums.worst.difference,
        logprob_diff_mean=sums.logprob_diff / max(sums.sampled, 1.0),
        stop_tokens=int(sums.stops),
        stop_logprob_diff=sums.stop_diff / sums.stops if sums.stops else math.nan,
        supervised=order.supervised,
        written_fraction=1.0 - len(lags) / len(rollouts),
    )
