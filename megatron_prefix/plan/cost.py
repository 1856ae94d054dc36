"""Tokens and FLOPs of a whole run, by its policy's lengths."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prefix.config import Recipe
from megatron_prefix.modes import needs_prompts
from megatron_prefix.prefix import (
    ModelShape,
    StepCost,
    build_policy,
    loss_start,
    model_shape,
    step_flops,
)
from megatron_prefix.prefix.policy import ScheduledPolicy
from megatron_prefix.preflight import open_prompts
from megatron_prefix.types import Flops
from megatron_prefix.validate import ValidRun
from megatron_prefix.validate_data import is_local
from megatron_prefix.written import written_data

PROMPTS_LOOKED_AT = 256


@dataclass(frozen=True)
class CostPlan:
    """Tokens and FLOPs where every rollout fills its prefix length: none ends by itself."""

    steps: int
    rollouts_a_step: int
    microbatches_a_replica: int
    prompt_tokens: int  # a rollout
    prompt_tokens_from: str  # where that number comes from
    lengths_known: bool  # False: the policy moves with the data, and its shortest is taken
    shortest_prefix: int
    longest_prefix: int
    mean_prefix: float
    run: StepCost

    @property
    def mean_step_flops(self) -> float:
        return self.run.flops.total / self.steps


def plan_cost(run: ValidRun, prompt_lengths: Sequence[int]) -> CostPlan:
    """``prompt_lengths``: tokens of some of the run's prompts, if known."""
    recipe = run.recipe
    policy = build_policy(recipe.prefix, recipe.train.steps)
    steps = range(recipe.train.steps)
    windows = Counter((policy.length(step), loss_start(policy, step)) for step in steps)
    lengths = [length for length, _ in windows.elements()]
    prompt, source = _prompt_tokens(recipe, prompt_lengths)
    shapes = (model_shape(run.student.hf.config), model_shape(run.teacher.hf.config))
    batch = recipe.train.global_batch_size
    return CostPlan(
        steps=recipe.train.steps,
        rollouts_a_step=batch,
        microbatches_a_replica=batch // recipe.train.micro_batch_size // run.student.layout.dp,
        prompt_tokens=prompt,
        prompt_tokens_from=source,
        lengths_known=isinstance(policy, ScheduledPolicy),
        shortest_prefix=min(lengths),
        longest_prefix=max(lengths),
        mean_prefix=sum(lengths) / recipe.train.steps,
        run=_run_cost(shapes, prompt, windows, batch, recipe.prefix.max_length),
    )


def _prompt_tokens(recipe: Recipe, prompt_lengths: Sequence[int]) -> tuple[int, str]:
    if not prompt_lengths:
        return recipe.data.max_prompt_length, "data.max_prompt_length, an upper bound"
    mean = round(sum(prompt_lengths) / len(prompt_lengths))
    return mean, f"mean of the first {len(prompt_lengths)} prompts"


def _run_cost(
    shapes: tuple[ModelShape, ModelShape],
    prompt: int,
    windows: Counter[tuple[int, int]],
    batch: int,
    full: int,
) -> StepCost:
    """``windows``: how many steps have which prefix length and start of the loss."""
    steps = windows.total()

    def one(length: int, start: int) -> Flops:
        return step_flops(*shapes, [(prompt, length)], start)

    return StepCost(
        flops=sum((_times(one(*each), count * batch) for each, count in windows.items()), Flops()),
        flops_full=_times(one(full, 0), steps * batch),
        prompt_tokens=prompt * steps * batch,
        prefix_tokens=sum(length * count for (length, _), count in windows.items()) * batch,
        full_tokens=full * steps * batch,
    )


def _times(flops: Flops, count: int) -> Flops:
    return Flops(flops.rollout * count, flops.teacher * count, flops.student * count)


def first_prompt_lengths(run: ValidRun) -> list[int]:
    """Tokens of the first prompts of a data set on this machine; none for a hub id or a replay."""
    recipe = run.recipe
    data = recipe.data if needs_prompts(recipe) else written_data(recipe)
    if recipe.rollout.replay or not is_local(data.path):
        return []
    return [len(prompt.input_ids) for prompt in open_prompts(run.recipe).take(PROMPTS_LOOKED_AT)]
