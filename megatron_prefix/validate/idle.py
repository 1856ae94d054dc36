"""Settings that a run never comes to, said before it starts. Pure.

They are no errors: a recipe of thousands of steps is tried with a few.
"""

from collections.abc import Iterator

from megatron_prefix.config import Recipe
from megatron_prefix.prefix import build_policy
from megatron_prefix.prefix.policy import ScheduledPolicy


def idle_settings(recipe: Recipe) -> list[str]:
    """A sentence for each, with its value. ``recipe`` is one that ``validate`` found sound."""
    return [*_past_the_last_step(recipe), *_past_the_longest_prefix(recipe)]


def _past_the_last_step(recipe: Recipe) -> Iterator[str]:
    steps, mode, prefix = recipe.train.steps, recipe.mode, recipe.prefix
    policy = build_policy(prefix, steps)
    if isinstance(policy, ScheduledPolicy) and prefix.policy not in ("fixed", "window"):
        longest = max(policy.length(step) for step in range(steps))
        if longest == prefix.min_length < prefix.max_length:
            yield (
                f"prefix.policy={prefix.policy} stays at prefix.min_length={longest} in all of "
                f"train.steps={steps}"
            )
    if mode.name != "sft" and mode.warmup_steps >= steps:
        yield (
            f"mode.warmup_steps={mode.warmup_steps} leaves none of train.steps={steps} to "
            f"mode.name={mode.name}"
        )
    intervals = {
        "eval.interval": recipe.eval.interval if recipe.eval.path else 0,
        "log.probe_interval": recipe.log.probe_interval,
        "checkpoint.save_interval": recipe.checkpoint.save_interval,
        "mode.refresh_teacher_every": mode.refresh_teacher_every,
    }
    late = [f"{key}={interval}" for key, interval in intervals.items() if interval > steps]
    if late:
        yield f"train.steps={steps} ends before {', '.join(late)} comes round"


def _past_the_longest_prefix(recipe: Recipe) -> Iterator[str]:
    prefix, weights = recipe.prefix, recipe.loss.weights
    cut_off, recall, longest = prefix.cut_off, prefix.recall, prefix.max_length
    needed = {
        "prefix.cut_off": max(cut_off.min_tokens, cut_off.window) if cut_off.rule != "none" else 0,
        "prefix.recall": max(recall.min_tokens, recall.window) if recall.threshold else 0,
    }
    for key, tokens in needed.items():
        if tokens >= longest:
            yield (
                f"{key} asks for {tokens} tokens (min_tokens, window) and no rollout is longer "
                f"than prefix.max_length={longest}: none is ended by it"
            )
    if weights.rule == "change_point" and 2 * weights.min_tokens > longest:
        yield (
            f"loss.weights.min_tokens={weights.min_tokens} on both sides of a change point is more "
            f"than prefix.max_length={longest}: every token weighs 1"
        )
