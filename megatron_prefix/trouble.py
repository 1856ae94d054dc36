"""What ends a run that goes wrong without an error."""

from megatron_prefix.config import Recipe
from megatron_prefix.types import StepMetrics
from megatron_prefix.weighing.prefix_sums import PrefixSums


class TrainingStopped(RuntimeError):
    """Too many non-finite steps in a row, or server and trainer disagree."""


def stop_on_trouble(
    recipe: Recipe, metrics: StepMetrics, sums: PrefixSums, skipped_in_a_row: int
) -> None:
    """TrainingStopped with the figures and what to do, where a step asks for it."""
    limit = recipe.train.max_skipped_steps
    if skipped_in_a_row >= limit:
        raise TrainingStopped(
            f"step {metrics.step}: {limit} steps in a row had a non-finite loss "
            f"({metrics.loss}) or gradient norm ({metrics.grad_norm}); the weights are those "
            f"of step {metrics.step - limit}; resume from the last checkpoint with a lower "
            f"optimizer.lr={recipe.optimizer.lr}"
        )
    tolerance = recipe.rollout.logprob_tolerance
    # A replay may well be of other weights, and rollouts that lag are.
    on_policy = not recipe.rollout.replay and metrics.policy_lag == 0
    if on_policy and sums.worst.difference > tolerance:
        raise TrainingStopped(
            f"step {metrics.step}: a sampled token has log-probability {sums.worst.server:.6f} "
            f"on the server and {sums.worst.trainer:.6f} in the trainer; they may differ by "
            f"rollout.logprob_tolerance={tolerance}"
        )
