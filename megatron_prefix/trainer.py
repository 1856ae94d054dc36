"""The loop. A step reads top to bottom in ``train_step``; ``assemble.py`` builds the parts."""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.batch import MicrobatchPlan, as_teacher_reads, pack, padded_for
from megatron_prefix.conductor import Conductor
from megatron_prefix.config import Recipe
from megatron_prefix.health.phases import Phases
from megatron_prefix.health.slow_phases import SlowPhases
from megatron_prefix.health.step_times import gather_hosts, gather_times, time_work
from megatron_prefix.health.watchdog import NoWatchdog, Watchdog
from megatron_prefix.mcore.checkpoint import Checkpointer
from megatron_prefix.mcore.export import export_hf
from megatron_prefix.mcore.offload import Offload
from megatron_prefix.mcore.optimizer import TrainableStudent, UpdateResult
from megatron_prefix.modes import (
    asks_servers,
    evaluation_due,
    is_supervised,
    probe_due,
    weight_rule,
)
from megatron_prefix.orders import Order, microbatches, share_order
from megatron_prefix.publisher import NoPublisher, Publisher
from megatron_prefix.saves import Saves
from megatron_prefix.student import Objective, forward_backward, score
from megatron_prefix.teacher import Teacher
from megatron_prefix.teachers.lagged import LaggedTeacher
from megatron_prefix.trouble import stop_on_trouble
from megatron_prefix.types import PrefixBatch, StepMetrics, Targets
from megatron_prefix.weighing.agreement import Audit, audit_gradients
from megatron_prefix.weighing.prefix_sums import PrefixSums
from megatron_prefix.weighing.reweigh import Weighted, reweigh
from megatron_prefix.weighing.step_metrics import step_metrics
from megatron_prefix.weighing.token_kl import by_rollout

logger = logging.getLogger(__name__)


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
    watchdog: Watchdog | NoWatchdog = field(default_factory=NoWatchdog)
    offload: Offload = field(default_factory=Offload)  # of teachers' weights
    lagged: LaggedTeacher | None = None  # where the teacher follows the student
    # To servers that evaluate while training goes on.
    evaluation_publisher: Publisher = field(default_factory=NoPublisher)


class Trainer:
    """Runs a recipe from where its checkpoints are to its last step."""

    def __init__(self, recipe: Recipe, parts: Parts) -> None:
        self._recipe, self._parts = recipe, parts
        self._step = 0  # finished steps
        self._policy_version = self._published = 0
        self._skipped_in_a_row = 0
        self._saves = Saves(parts.checkpointer, parts.conductor)
        self._slow_phases = SlowPhases(gather_hosts())

    def train(self) -> bool:
        """Train to the last step; False where a signal ended the run early, its state saved."""
        self._begins("restore")
        self._restore()
        self._begins("first sync")
        self._publish()
        if self._step == 0:
            self._probe_if_due()
        self._evaluate_if_due()
        while self._step < self._recipe.train.steps:
            phases = Phases(self._synchronize, self._begins)
            self._parts.offload.begin_step(used=not is_supervised(self._recipe, self._step))
            with phases.phase("rollout"):
                order = self._agree(self._decide)
            if order.kind == "save_and_stop":
                self._save(wait=True)
                self._begins("last evaluation")
                if self._parts.conductor:
                    self._parts.conductor.stop_evaluations()
                self._agree(lambda: Order("done"))  # a teacher elsewhere waits
                return False
            self.train_step(order, phases)
            self._after_step()
        self._save(wait=True)
        if self._recipe.checkpoint.export_hf:
            self._export()
        self._agree(self._finish_evaluations)
        self._agree(lambda: Order("done"))  # a teacher elsewhere waits
        return True

    def _begins(self, what: str) -> None:
        self._parts.watchdog.beat(f"{what} of step {self._step + 1}")

    def train_step(self, order: Order, phases: Phases) -> StepMetrics:
        """One step on the rollouts of ``order``, the same on every rank."""
        parts = self._parts
        plan = self._plan(order)
        if asks_servers(self._recipe, self._step + 1):
            parts.publisher.prepare()
        with phases.phase("teacher"):
            targets = None if order.supervised else self._targets(order, plan)
            weighted = self._weighted(self._own_batches(order, plan), targets)
        phases.carve("teacher", self._parts.offload.take_waited())
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
        signal = by_rollout(
            self._parts.student.model.groups, plan, order.rollouts, own, self._parts.device
        )
        if self._parts.conductor:
            self._parts.conductor.recall(order, signal)

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
        layout, multiple = self._parts.student.model.groups.layout, self._parts.token_multiple
        plan = microbatches(order, self._recipe.train, multiple, layout.dp)
        return padded_for(layout.cp, order.rollouts, plan)

    def _own_batches(self, order: Order, plan: MicrobatchPlan) -> list[PrefixBatch]:
        groups = self._parts.student.model.groups
        own = plan.of_replica(groups.dp_rank, groups.layout.dp)
        return [pack(order.rollouts, plan, m, self._parts.device) for m in own]

    def _weighted(self, batches: list[PrefixBatch], targets: Iterable[Targets] | None) -> Weighted:
        rule, parts = weight_rule(self._recipe, self._step), self._parts
        if targets is None or rule == "uniform":
            return Weighted(batches, targets, effective_share=1.0)
        weights = replace(self._recipe.loss.weights, rule=rule)
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
        overlap_k = self._parts.objective.overlap_k
        metrics = step_metrics(self._step, order, sums, update, lr, sampled_version, overlap_k)
        metrics = replace(metrics, effective_share=weighted.effective_share)
        self._judge_times(phases, order.prefix_length)
        if self._parts.conductor:
            metrics = self._parts.conductor.record(metrics, order, phases)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if metrics.skipped else 0
        stop_on_trouble(self._recipe, metrics, sums, self._skipped_in_a_row)
        return metrics

    def _judge_times(self, phases: Phases, length: int) -> None:
        """Say in a line where a phase was far slower than usual, and on which rank."""
        parts = self._parts
        times = gather_times(
            phases.seconds(),
            parts.watchdog.stood_still(),
            time_work(parts.device),
            length,
            parts.device,
        )
        if times is not None and parts.conductor:
            parts.conductor.log.times(times, self._slow_phases.judge(self._step, times))

    def _decide(self) -> Order:
        assert self._parts.conductor is not None
        return self._parts.conductor.order(self._step, self._policy_version)

    def _after_step(self) -> None:
        interval = self._recipe.checkpoint.save_interval
        self._saves.finalize(wait=False)
        if self._parts.lagged:
            self._parts.lagged.refresh(self._step)
        self._probe_if_due()  # before the save, which holds what the policy learns from it
        if interval and self._step % interval == 0:
            self._save(wait=False)
        self._evaluate_if_due()

    def _probe_if_due(self) -> None:
        """Full-length rollouts, scored and not trained on; the same decision on every rank."""
        if not probe_due(self._recipe, self._step):
            return
        parts = self._parts
        order = self._agree(self._decide_probe)
        if order.kind != "probe":
            return
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
        if evaluation_due(self._recipe, self._step):
            self._agree(self._evaluate)

    def _evaluate(self) -> Order:
        assert self._parts.conductor is not None
        return self._parts.conductor.evaluate(self._step, self._policy_version)

    def _finish_evaluations(self) -> Order:
        assert self._parts.conductor is not None
        return self._parts.conductor.finish_evaluations(self._step, self._policy_version)

    def _agree(self, decide: Callable[[], Order]) -> Order:
        """What rank 0 decides, once servers are there that hold the current weights."""
        while True:
            self._begins("order")
            with self._parts.watchdog.waits_for_rank_0():
                order = share_order(decide, self._parts.host_group)
            if order.kind == "sync":
                self._begins("sync")
                self._publish()
            elif order.kind == "sync_evaluation":
                self._begins("sync")
                self._parts.evaluation_publisher.publish(self._policy_version)
            elif order.kind != "wait":
                return order

    def _save(self, *, wait: bool) -> None:
        if self._step:  # before the first, nothing is trained, and Adam's moments are not there yet
            self._begins("save")
            self._saves.save(self._step, self._policy_version, wait=wait)

    def _export(self) -> None:
        self._begins("export")
        model, goes_on = self._parts.student.model, self._parts.watchdog.goes_on
        folder = self._parts.export_folder
        export_hf(model, folder, model.config.params_dtype, on_bucket=goes_on)

    def _restore(self) -> None:
        restored = self._saves.restore()
        if restored is None:
            return
        self._step = restored.step
        self._policy_version = restored.run_state["policy_version"]
        if self._parts.lagged:
            self._parts.lagged.restore(self._step)
        logger.info("resumed after step %d from %s", restored.step, restored.folder.name)

    def _synchronize(self) -> None:
        if self._parts.device.type == "cuda":
            torch.cuda.synchronize()
