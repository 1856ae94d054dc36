"""Settings that a run never comes to, said before it starts. Pure.

They are no errors: a recipe of thousands of steps is tried with a few.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_prefix.config import Recipe
from megatron_prefix.config.modes import ModeConfig
from megatron_prefix.modes import is_supervised, needs_rollouts, needs_teacher
from megatron_prefix.prefix import build_policy, is_scheduled
from megatron_prefix.prefix.registry import POLICIES
from megatron_prefix.rollout.records import recorded_steps


def idle_settings(recipe: Recipe) -> list[str]:
    """A sentence for each, with its value. ``recipe`` is one that ``validate`` found sound."""
    return [
        *_past_the_last_step(recipe),
        *_past_the_longest_prefix(recipe),
        *_without_sampling(recipe),
        *_without_teacher(recipe),
        *_of_another_mode(recipe),
        *_of_another_policy(recipe),
    ]


def _past_the_last_step(recipe: Recipe) -> Iterator[str]:
    steps, mode, prefix = recipe.train.steps, recipe.mode, recipe.prefix
    policy = build_policy(prefix, steps)
    if is_scheduled(policy) and prefix.policy not in ("fixed", "window"):
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
    recorded = recorded_steps(recipe.rollout.replay) if recipe.rollout.replay else steps
    if recorded < steps:
        yield (
            f"rollout.replay={recipe.rollout.replay} has {recorded} steps of train.steps={steps}: "
            "the run ends there, with an error"
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


def _without_sampling(recipe: Recipe) -> Iterator[str]:
    prefix, over_sample = recipe.prefix, recipe.rollout.over_sample
    settings = {
        f"prefix.cut_off.rule={prefix.cut_off.rule}": prefix.cut_off.rule != "none",
        f"prefix.recall.threshold={prefix.recall.threshold:g}": prefix.recall.threshold > 0,
        f"rollout.over_sample={over_sample:g}": over_sample > 1,
    }
    idle = [setting for setting, is_set in settings.items() if is_set]
    if idle and not (needs_rollouts(recipe) or recipe.rollout.replay):
        yield f"{', '.join(idle)}: for sampled rollouts, and no step of {_mode(recipe)} has any"


def _without_teacher(recipe: Recipe) -> Iterator[str]:
    loss, plain, prompt = recipe.loss, Recipe().loss, recipe.mode.teacher_prompt
    settings = {
        f"loss.divergence={loss.divergence}": loss.divergence != plain.divergence,
        f"loss.weights.rule={loss.weights.rule}": loss.weights != plain.weights,
    }
    if is_supervised(recipe, recipe.train.steps - 1):
        idle = [setting for setting, is_set in settings.items() if is_set]
        if prompt != type(prompt)() and not needs_teacher(recipe):
            idle.append("mode.teacher_prompt")
        if idle:
            yield f"{', '.join(idle)}: for a teacher, and no step of {_mode(recipe)} has one"


def _of_another_mode(recipe: Recipe) -> Iterator[str]:
    mode, prompt = recipe.mode, recipe.mode.teacher_prompt
    if mode.name != "mixed" and mode.written_share != ModeConfig().written_share:
        yield (
            f"mode.written_share={mode.written_share:g} is for mode.name=mixed, and here it is "
            f"{mode.name}"
        )
    if prompt.max_length and prompt == replace(type(prompt)(), max_length=prompt.max_length):
        yield (
            f"mode.teacher_prompt.max_length={prompt.max_length} bounds a prompt of the teacher's "
            "own, and it reads the student's: set mode.teacher_prompt.template or system_prompt"
        )


def _of_another_policy(recipe: Recipe) -> Iterator[str]:
    """A user's own policy may read any of them."""
    prefix, plain = recipe.prefix, Recipe().prefix
    for name in POLICIES:
        others = getattr(prefix, name, None)
        if (
            prefix.policy in POLICIES
            and name != prefix.policy
            and others != getattr(plain, name, None)
        ):
            yield f"prefix.{name} has settings, which prefix.policy={prefix.policy} does not read"
    on_tail, unprobed = prefix.adaptive.on_tail, not recipe.log.probe_interval
    if prefix.policy == "adaptive" and unprobed and on_tail != plain.adaptive.on_tail:
        yield f"prefix.adaptive.on_tail={on_tail} answers probes, and log.probe_interval is 0"


def _mode(recipe: Recipe) -> str:
    mode, steps = recipe.mode, recipe.train.steps
    if mode.name != "sft" and mode.warmup_steps >= steps:
        return f"train.steps={steps} within mode.warmup_steps={mode.warmup_steps}"
    return f"mode.name={mode.name}"
