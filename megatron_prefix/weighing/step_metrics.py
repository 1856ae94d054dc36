"""What a step reports, out of its order, its sums and its update. Pure."""

import math
from typing import TYPE_CHECKING

import numpy as np

from megatron_prefix.orders import Order
from megatron_prefix.types import StepMetrics

if TYPE_CHECKING:
    from megatron_prefix.mcore.optimizer import UpdateResult
    from megatron_prefix.weighing.prefix_sums import PrefixSums


def step_metrics(
    step: int,
    order: Order,
    sums: "PrefixSums",
    update: "UpdateResult",
    lr: float,
    sampled_version: int,
    overlap_k: int = 0,
) -> StepMetrics:
    """What every rank knows of a step; rank 0 adds FLOPs and seconds."""
    rollouts = order.rollouts
    reached = sum(len(r.prefix_ids) >= order.prefix_length for r in rollouts)
    compared = overlap_k and not order.supervised
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
        overlap_by_position=(sums.overlap / sums.tokens).numpy() if compared else np.zeros(0),
        discarded_tokens=sum(r.discarded for r in rollouts)
        + sum(tokens for _, tokens in order.discarded),
    )
