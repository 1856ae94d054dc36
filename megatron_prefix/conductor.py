"""Rank 0's share of the loop: prompts, prefix policy, rollouts, ledger, evaluation, logs.

The other ranks get its decisions as an ``Order`` and need none of its state.
"""

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from megatron_prefix.batch import count_loss_tokens, nothing_to_train_on
from megatron_prefix.config import Recipe
from megatron_prefix.data.sources import RolloutSource
from megatron_prefix.evaluation.beside import Answered, Evaluator, ServerFleet, SideEvaluations
from megatron_prefix.health.phases import Phases
from megatron_prefix.modes import is_supervised, last_evaluation_due, more_passes, written_count
from megatron_prefix.orders import Order
from megatron_prefix.prefix import Ledger, PrefixObservation, PrefixPolicy, loss_start
from megatron_prefix.prefix.recall import Recall
from megatron_prefix.probes import Prober, Probes
from megatron_prefix.rollout.discarded import Discarded, sampled_lengths, unreadable
from megatron_prefix.rollout.pool import FAULTS
from megatron_prefix.rollout.protocol import NoRollouts
from megatron_prefix.run_files.kl_grid import mean_kl
from megatron_prefix.run_files.log import RunLog
from megatron_prefix.types import Rollout, StepMetrics

_WAIT_S = 1.0  # between two looks at servers that are to come back
Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Staff:
    """The parts that rank 0 alone has, and the conductor uses."""

    policy: PrefixPolicy
    source: RolloutSource
    ledger: Ledger
    open_log: Callable[[int], RunLog]  # from the step that the run goes on after
    decode: Decode
    evaluate: Evaluator | None
    probe: Prober | None
    stop_requested: Callable[[], bool]
    recall: Recall | None = None  # caps for prompts that come again; the source's too
    discarded: Discarded = field(default_factory=Discarded)  # what the source's servers threw away
    vocabularies: Mapping[str, int] = field(default_factory=dict)  # of teachers, by domain
    fleet: ServerFleet | None = None  # None: nobody is asked for rollouts
    evaluation_fleet: ServerFleet | None = None  # None: evaluations share the other


class Conductor:
    """Decides each turn of the loop, and accounts for it. On rank 0 alone; not collective."""

    def __init__(self, recipe: Recipe, staff: Staff) -> None:
        self._recipe, self._staff = recipe, staff
        self._log: RunLog | None = None
        self._aside: SideEvaluations | None = None
        self._probes: Probes | None = None
        if staff.probe is not None:
            self._probes = Probes(recipe, staff.policy, staff.ledger, self._probe)
        if staff.evaluate is not None and staff.evaluation_fleet is not None:
            self._aside = SideEvaluations(staff.evaluate, staff.evaluation_fleet, self)

    @property
    def log(self) -> RunLog:
        if self._log is None:
            self._open_log(0)
        assert self._log is not None
        return self._log

    def _open_log(self, step: int) -> None:
        self._log = self._staff.open_log(step)
        for fleet in (self._staff.fleet, self._staff.evaluation_fleet):
            if fleet is not None:
                fleet.tell_to(self._tell_of_servers)

    def _tell_of_servers(self, words: str) -> None:
        self.log.event("servers", words, level=logging.WARNING)

    def resume(self, step: int, state: dict[str, Any]) -> None:
        """Take over the ``state_dict`` that a checkpoint holds of step ``step``, and open the log
        behind that step."""
        self._staff.policy.load_state_dict(state["policy"])
        self._staff.source.load_state_dict(state["source"])
        self._staff.ledger.load_state_dict(state["ledger"])
        if self._staff.recall:
            self._staff.recall.load_state_dict(state.get("recall", {}))
        self._open_log(step)
        self.log.event("resume", f"resumed after step {step}")
        if self._aside:
            due = last_evaluation_due(self._recipe, step)
            self._aside.resume(owed=max(self.evaluated(), default=-1) < due)

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "policy": self._staff.policy.state_dict(),
            "source": self._staff.source.state_dict(),
            "ledger": self._staff.ledger.state_dict(),
            "recall": self._staff.recall.state_dict() if self._staff.recall else {},
        }

    def order(self, step: int, policy_version: int) -> Order:
        """What to do after ``step`` finished steps."""
        if self._staff.stop_requested():
            self.log.event("stop", f"stop requested: saving after step {step}")
            return Order("save_and_stop")
        made_up = self._aside.look(step, policy_version) if self._aside else None
        if made_up:
            return made_up
        source = self._staff.source.state_dict()
        written = written_count(self._recipe, step) == self._recipe.train.global_batch_size
        if written:
            order = self._train(step, policy_version)
        else:
            order = self._with_servers(policy_version, lambda: self._train(step, policy_version))
        if order.kind == "train" and not self._staff.stop_requested():
            return order
        # The step is not begun: its prompts are asked again.
        self._staff.source.load_state_dict(source)
        return order if order.kind != "train" else self.order(step, policy_version)

    def _train(self, step: int, policy_version: int) -> Order:
        length = self._staff.policy.length(step)
        start = loss_start(self._staff.policy, step)
        rollouts = self._sample(step, length, start, policy_version)
        # A recording may be longer than what the policy says now: no probe moved it this time.
        length = max([length, *(len(rollout.prefix_ids) for rollout in rollouts)])
        supervised = is_supervised(self._recipe, step)
        return Order(
            "train",
            length,
            tuple(rollouts),
            loss_start=start,
            supervised=supervised,
            discarded=self._staff.discarded.take(),
        )

    def _with_servers(self, policy_version: int, act: Callable[[], Order]) -> Order:
        """``act()`` once servers hold ``policy_version``, or what has to come before it."""
        fleet = self._staff.fleet
        if fleet is None:
            return act()
        if fleet.in_step(policy_version):
            try:
                return act()
            except FAULTS:
                if fleet.members:  # not a fault of servers, or not one that losing them mends
                    raise
        if fleet.members:
            return Order("sync")
        fleet.expect()
        time.sleep(_WAIT_S)
        return Order("wait")

    def _sample(self, step: int, length: int, start: int, policy_version: int) -> list[Rollout]:
        """Rollouts with a token that the loss counts: where every one ended before, or was
        aborted by somebody, others."""
        for _ in range(self._recipe.train.max_skipped_steps):
            try:
                sampled = self._staff.source.sample(step, length, policy_version)
                gone = unreadable(sampled, self._staff.vocabularies)
                self._staff.discarded.add(sampled_lengths(gone))
                rollouts = self._without(gone, sampled)
                if count_loss_tokens(rollouts, start) or self._staff.stop_requested():
                    return rollouts
                why = nothing_to_train_on(rollouts, start)
                self._staff.discarded.add(sampled_lengths(rollouts))
            except NoRollouts as error:
                why = str(error)
            self.log.event("empty", why, level=logging.WARNING)
        raise ValueError(
            f"{why}, and so {self._recipe.train.max_skipped_steps} times in a row; does the "
            "student end at once, do the written answers, or does prefix.window begin too late?"
        )

    def _without(self, gone: Sequence[Rollout], rollouts: Sequence[Rollout]) -> list[Rollout]:
        """``rollouts`` but those that their teacher cannot read, of which an event tells."""
        if gone:
            self.log.event(
                "alarm",
                f"{len(gone)} of {len(rollouts)} rollouts are thrown away: token "
                f"{max(gone[0].prefix_ids)} is none of the teacher's, the student sampled one of "
                "its padding",
                level=logging.WARNING,
            )
        return [rollout for rollout in rollouts if rollout not in gone]

    def record(self, metrics: StepMetrics, order: Order, phases: Phases) -> StepMetrics:
        """Account for and log a finished step; returns its metrics with FLOPs and seconds."""
        rollouts = order.rollouts
        cost = self._staff.ledger.measure(
            rollouts,
            order.loss_start,
            supervised=order.supervised,
            discarded=order.discarded,
            more_passes=more_passes(self._recipe, metrics.step - 1),
        )
        self._staff.ledger.add(cost)
        metrics = replace(
            metrics, flops=cost.flops, flops_full=cost.flops_full, seconds=phases.seconds()
        )
        if not order.supervised:  # a cross-entropy says nothing about the teacher
            self._observe(metrics, order)
        self.log.step(metrics)
        if self._staff.fleet is not None:
            self.log.servers(len(self._staff.fleet.members))
        if metrics.skipped:
            self.log.event(
                "skipped",
                f"step {metrics.step} had loss {metrics.loss} and gradient norm "
                f"{metrics.grad_norm}: no update was made",
            )
        if self.log.wants_rollouts(metrics.step):
            self._log_texts(metrics.step, rollouts)
        return metrics

    def _observe(self, metrics: StepMetrics, order: Order) -> None:
        self._staff.policy.observe(
            PrefixObservation(
                step=metrics.step - 1,
                prefix_length=metrics.prefix_length,
                loss_start=order.loss_start,
                mean_kl=mean_kl(metrics.kl_by_position, metrics.tokens_by_position),
                kl_by_position=metrics.kl_by_position,
                tokens_by_position=metrics.tokens_by_position,
                prompt_length=metrics.prompt_tokens / len(order.rollouts),
                overlap_by_position=metrics.overlap_by_position,
            )
        )

    def recall(self, order: Order, signal: Sequence[np.ndarray]) -> None:
        """Let the caps of prompts that come again learn from a step.

        ``signal``: by rollout, a value for each of its tokens in the loss (``prefix.recall``).
        Written rollouts are left out: they say nothing of what the student samples.
        """
        assert self._staff.recall is not None
        sampled = [pair for pair in zip(order.rollouts, signal, strict=True) if not pair[0].written]
        rollouts, values = [pair[0] for pair in sampled], [pair[1] for pair in sampled]
        self._staff.recall.observe(rollouts, values, order.loss_start)

    def _log_texts(self, step: int, rollouts: Sequence[Rollout]) -> None:
        shown = rollouts[: self._recipe.log.sample_rollouts]
        self.log.rollouts(
            step,
            [self._staff.decode(r.prompt_ids) for r in shown],
            [self._staff.decode(r.prefix_ids) for r in shown],
            [_details(rollout) for rollout in shown],
        )

    def probe_order(self, step: int, policy_version: int) -> Order:
        """Full-length rollouts to score; none where there is not a token in them."""
        if self._stops_alone():  # the next order saves
            return Order("nothing")
        assert self._probes is not None
        probe = functools.partial(self._probes.order, step, policy_version, self.log)
        return self._with_servers(policy_version, probe)

    def _probe(self, policy_version: int) -> list[Rollout]:
        assert self._staff.probe is not None
        rollouts = self._staff.probe(policy_version)
        return self._without(unreadable(rollouts, self._staff.vocabularies), rollouts)

    def record_probe(
        self,
        step: int,
        order: Order,
        kl_L: np.ndarray,
        tokens_L: np.ndarray,
        agreement: float = math.nan,
    ) -> None:
        """See :meth:`Probes.record`."""
        assert self._probes is not None
        self._probes.record(step, order, kl_L, tokens_L, agreement, self.log)

    def evaluate(self, step: int, policy_version: int) -> Order:
        """Once a step, where servers are there to ask."""
        if self._aside:
            stops = self._staff.stop_requested()  # a resumed run makes it
            return Order("nothing") if stops else self._aside.begin(step, policy_version)
        if self._staff.evaluate is None or step in self.evaluated() or self._stops_alone():
            return Order("nothing")
        return self._with_servers(policy_version, lambda: self._evaluate(step, policy_version))

    def finish_evaluations(self, step: int, policy_version: int) -> Order:
        """After the last step: ``nothing`` once all that were begun are entered."""
        if self._aside is None:
            return Order("nothing")
        if not self._staff.stop_requested():
            return self._aside.finish(step, policy_version)
        self.stop_evaluations()
        return Order("nothing")

    def stop_evaluations(self) -> None:
        """The run stops, and is saved."""
        if self._aside:
            self._aside.stop(self._recipe.eval.stop_wait_s)

    def evaluated(self) -> set[int]:
        """The steps whose evaluation is in the log."""
        return self.log.evaluated()

    def _stops_alone(self) -> bool:
        """Whether the run is to stop, and no server is there that could be asked before."""
        fleet = self._staff.fleet
        return self._staff.stop_requested() and fleet is not None and not fleet.members

    def _evaluate(self, step: int, policy_version: int) -> Order:
        assert self._staff.evaluate is not None
        try:
            self.enter_evaluation(step, self._staff.evaluate(step, policy_version, None))
        except NoRollouts as error:
            self.tell_of_evaluations(f"no evaluation of step {step}: {error}")
        return Order("nothing")

    def enter_evaluation(self, step: int, result: Answered) -> None:
        self.log.evaluation(step, result, self._staff.ledger.measure_answers(result.lengths))

    def tell_of_evaluations(self, words: str) -> None:
        self.log.event("evaluation", words, level=logging.WARNING)

    def close(self) -> None:
        if self._log is not None:
            self._log.close()


def _details(rollout: Rollout) -> dict[str, str | int]:
    author, tokens = "written" if rollout.written else "student", len(rollout.prefix_ids)
    told: dict[str, str | int] = {"finish_reason": rollout.finish_reason, "tokens": tokens}
    return told | {"policy_version": rollout.policy_version, "author": author}
