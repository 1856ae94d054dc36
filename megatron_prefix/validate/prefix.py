"""Refuses a ``prefix`` section that cannot be, in one line, before anything starts."""

from megatron_prefix.config import PrefixConfig, Recipe
from megatron_prefix.modes import needs_teacher, probe_due
from megatron_prefix.prefix import build_cut_off, build_policy, loss_start
from megatron_prefix.prefix.recall import check as check_recall


def check_prefix(recipe: Recipe) -> None:
    """A user's own policy that leaves its bounds by schedule says so now, not in mid-run."""
    policy = build_policy(recipe.prefix, recipe.train.steps)
    for step in range(recipe.train.steps):
        policy.length(step)
        loss_start(policy, step)
    if probe_due(recipe, recipe.train.steps):
        policy.length(recipe.train.steps)  # where the last probe parts prefix and tail
    build_cut_off(recipe.prefix.cut_off, vocab_size=2)  # its settings need no model's
    check_recall(recipe.prefix.recall)
    _check_overlap(recipe)
    probed = recipe.log.probe_interval and recipe.log.probe_agreement
    if recipe.prefix.policy == "audited" and not probed:
        raise ValueError(
            "prefix.policy=audited learns from probes alone; set log.probe_interval=10 and leave "
            "log.probe_agreement=true"
        )


def check_overlap_k(prefix: PrefixConfig, vocabulary: int) -> None:
    """``vocabulary``: the tokens that student and teacher both have."""
    if prefix.overlap_k >= vocabulary:
        raise ValueError(
            f"prefix.overlap_k={prefix.overlap_k} compares all of the {vocabulary} tokens that "
            f"both models have; set it to {min(16, vocabulary - 1)}"
        )


def _check_overlap(recipe: Recipe) -> None:
    """What asks for the overlap of top-k tokens needs a k, and a teacher."""
    prefix = recipe.prefix
    askers = {
        "prefix.policy=overlap": prefix.policy == "overlap",
        "prefix.recall.signal=overlap": prefix.recall.signal == "overlap",
    }
    for asker, asks in askers.items():
        if asks and not prefix.overlap_k:
            raise ValueError(f"{asker} needs tokens to compare; set prefix.overlap_k=16")
        if asks and not needs_teacher(recipe):
            raise ValueError(f"{asker}, but no step of mode.name={recipe.mode.name} asks a teacher")
    threshold = prefix.recall.threshold
    if askers["prefix.recall.signal=overlap"] and not 0.0 <= threshold < 1.0:
        raise ValueError(
            f"prefix.recall.threshold={threshold} is no share of tokens below 1; try 0.5"
        )
