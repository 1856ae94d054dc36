"""Rank 0's share of probes: full-length rollouts that are scored and not trained on."""

import logging
from collections.abc import Callable

import numpy as np

from megatron_prefix.batch import count_loss_tokens
from megatron_prefix.config import Recipe
from megatron_prefix.health.alarms import probe_alarms
from megatron_prefix.orders import Order
from megatron_prefix.prefix import Ledger, PrefixPolicy, ProbeObservation, observe_probe
from megatron_prefix.rollout.protocol import NoRollouts
from megatron_prefix.run_files.kl_grid import mean_kl
from megatron_prefix.run_files.log import RunLog
from megatron_prefix.types import ProbeMetrics, Rollout

# Full-length rollouts of the probes' prompts, with the weights of this policy version.
Prober = Callable[[int], list[Rollout]]


class Probes:
    """Samples probes, and tells the log and the prefix policy what their scores say."""

    def __init__(
        self, recipe: Recipe, policy: PrefixPolicy, ledger: Ledger, sample: Prober
    ) -> None:
        self._recipe, self._policy, self._ledger = recipe, policy, ledger
        self._sample = sample

    def order(self, step: int, policy_version: int, log: RunLog) -> Order:
        """To score a probe's rollouts; without rollouts where there is not a token in them."""
        try:
            rollouts = tuple(self._sample(policy_version))
        except NoRollouts as error:
            log.event("empty", f"no probe after step {step}: {error}", level=logging.WARNING)
            rollouts = ()
        scored = rollouts if count_loss_tokens(rollouts, 0) else ()
        length = self._policy.length(step)
        audited = self._recipe.log.probe_agreement and count_loss_tokens(scored, length)
        longest = self._recipe.prefix.max_length
        return Order("probe", longest, scored, audit_length=length if audited else 0)

    def record(
        self,
        step: int,
        order: Order,
        kl_L: np.ndarray,
        tokens_L: np.ndarray,
        agreement: float,
        log: RunLog,
    ) -> None:
        """Log a scored probe, with alarms where it gives cause, and let the policy see it.

        ``kl_L`` fp64 [max_length] is the mean KL in nats by position, ``tokens_L`` the scored
        tokens there, ``agreement`` the cosine of the prefix's gradient with the full rollouts':
        NaN where the order did not ask for it.
        """
        length, rollouts = self._policy.length(step), order.rollouts
        if self._recipe.log.probe_agreement and not order.audit_length:
            agreement = 1.0  # the prefix is all there is
        metrics = ProbeMetrics(
            step=step,
            prefix_length=length,
            kl_prefix=mean_kl(kl_L[:length], tokens_L[:length]),
            kl_tail=mean_kl(kl_L[length:], tokens_L[length:]),
            kl_by_position=kl_L,
            tokens_by_position=tokens_L.astype(np.int64),
            finished=sum(rollout.finish_reason == "stop" for rollout in rollouts),
            rollouts=len(rollouts),
            flops=self._ledger.measure_probe(rollouts, 2 if order.audit_length else 0),
            agreement=agreement,
        )
        alarms = probe_alarms(self._recipe.log, metrics, log.probes())
        log.probe(metrics)
        for alarm in alarms:
            log.event("alarm", alarm, level=logging.WARNING)
        seen = (metrics.kl_prefix, metrics.kl_tail, agreement, kl_L)
        observe_probe(self._policy, ProbeObservation(step, length, *seen))
