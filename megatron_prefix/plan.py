"""What a recipe comes to, by arithmetic alone: nothing is started and no weight is read.

Bytes are what Megatron-Core allocates for parameters: weights in params_dtype, gradients in fp32,
Adam's two moments and, beside bf16 weights, an fp32 copy, sharded over data-parallel ranks with the
distributed optimizer. Activations and the communication libraries' buffers come on top.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from megatron_prefix.config import Recipe
from megatron_prefix.layout import Layout, padded_vocab_size
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
from megatron_prefix.validate import ValidModel, ValidRun
from megatron_prefix.validate_data import is_local
from megatron_prefix.written import written_data

if TYPE_CHECKING:
    from megatron_prefix.mcore.hf_map.units import Unit

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
DTYPE_BYTES = {"bf16": 2, "fp32": 4}
PROMPTS_LOOKED_AT = 256


@dataclass(frozen=True)
class ModelPlan:
    """One model over the ranks."""

    hf_path: str
    architecture: str
    parameters: int  # of the whole model, tied weights once
    vocab_size: int
    padded_vocab_size: int
    tensor_model_parallel_size: int
    data_parallel_size: int
    pipeline_model_parallel_size: int
    layers_by_stage: tuple[int, ...]
    groups: dict[str, tuple[tuple[int, ...], ...]]  # tp, dp, pp: the global ranks of each group


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds; sizes in bytes."""

    rank: int
    # tp, dp, pp; nothing where the rank holds no part of it, beside a separate teacher
    student_at: tuple[int, int, int] | tuple[()]
    teacher_at: tuple[int, int, int] | tuple[()]
    student_parameters: int
    student_weights: int
    student_gradients: int
    student_optimizer: int
    teacher_weights: int
    teacher_head: int  # the LM head's shard on the student's last stage

    @property
    def total(self) -> int:
        return (
            self.student_weights
            + self.student_gradients
            + self.student_optimizer
            + self.teacher_weights
            + self.teacher_head
        )


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


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    world_size: int
    student: ModelPlan
    teacher: ModelPlan
    ranks: tuple[RankPlan, ...]
    cost: CostPlan


def make_plan(run: ValidRun, prompt_lengths: Sequence[int] = ()) -> Plan:
    """The plan of a validated run; ``prompt_lengths``: tokens of some of its prompts, if known."""
    return Plan(
        recipe=run.recipe,
        world_size=run.world_size,
        student=_plan_model(run.student),
        teacher=_plan_model(run.teacher),
        ranks=tuple(_plan_rank(run, rank) for rank in range(run.world_size)),
        cost=_plan_cost(run, prompt_lengths),
    )


def rank_groups(layout: Layout) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Global ranks of every tensor-, data- and pipeline-parallel group, in rank order."""
    tp, dp, pp = range(layout.tp), range(layout.dp), range(layout.pp)
    return {
        "tp": tuple(tuple(layout.rank(t, d, p) for t in tp) for p in pp for d in dp),
        "dp": tuple(tuple(layout.rank(t, d, p) for d in dp) for p in pp for t in tp),
        "pp": tuple(tuple(layout.rank(t, d, p) for p in pp) for d in dp for t in tp),
    }


def _plan_model(model: ValidModel) -> ModelPlan:
    shape, layout = model.hf.shape, model.layout
    return ModelPlan(
        hf_path=str(model.hf.path),
        architecture=model.hf.config["architectures"][0],
        parameters=sum(_elements(unit) for unit in model.hf.units),
        vocab_size=shape.vocab_size,
        padded_vocab_size=padded_vocab_size(shape.vocab_size, layout.tp),
        tensor_model_parallel_size=layout.tp,
        data_parallel_size=layout.dp,
        pipeline_model_parallel_size=layout.pp,
        layers_by_stage=model.layers,
        groups=rank_groups(layout),
    )


def _plan_rank(run: ValidRun, rank: int) -> RankPlan:
    student, teacher = run.student, run.teacher
    student_at, teacher_at = (
        model.layout.coordinates(rank) if rank in model.layout.ranks else ()
        for model in (student, teacher)
    )
    trained, states, head, scored = 0, 0, 0, 0
    if student_at:
        trained = stage_parameters(student, student_at[2], with_head=True)
        states = _sharded_states(run, student_at[2], trained)
    if teacher_at:
        scored = stage_parameters(teacher, teacher_at[2], with_head=False)
    if student_at and student_at[2] == student.layout.pp - 1:
        tp = student.layout.tp
        rows = padded_vocab_size(student.hf.shape.vocab_size, tp) // tp
        head = rows * teacher.hf.shape.hidden_size
    width = DTYPE_BYTES[student.config.params_dtype]
    moments = 8 if width == 4 else 12  # two of fp32, and bf16 weights' fp32 copy
    return RankPlan(
        rank=rank,
        student_at=student_at,
        teacher_at=teacher_at,
        student_parameters=trained,
        student_weights=trained * width,
        student_gradients=trained * 4,
        student_optimizer=states * moments,
        teacher_weights=scored * DTYPE_BYTES[teacher.config.params_dtype],
        teacher_head=head * DTYPE_BYTES[teacher.config.params_dtype],
    )


def _sharded_states(run: ValidRun, stage: int, trained: int) -> int:
    """Of a rank's ``trained`` parameters, those whose optimizer state it holds."""
    if not run.recipe.optimizer.use_distributed_optimizer:
        return trained
    layout, experts = run.student.layout, stage_experts(run.student, stage)
    return -(-(trained - experts) // layout.dp) - (-experts // layout.expert_dp)


def stage_parameters(model: ValidModel, stage: int, *, with_head: bool) -> int:
    """Parameters of one rank of pipeline stage ``stage``. A tied LM head on a stage of its own is a
    copy of the embedding; a teacher is built without a head."""
    layout, last = model.layout, model.layout.pp - 1
    units = [
        unit
        for unit in model.hf.units
        if _stage_of(unit, model.layers) == stage and unit.expert < 0
    ]
    if not with_head:
        units = [unit for unit in units if unit.megatron_name != "output_layer.weight"]
    elif model.hf.shape.tied and stage == last > 0:
        units += [unit for unit in model.hf.units if unit.megatron_name == VOCABULARY[0]]
    return sum(_shard_elements(unit, layout.tp) for unit in units) + stage_experts(model, stage)


def stage_experts(model: ValidModel, stage: int) -> int:
    """Of :func:`stage_parameters`, those of the experts that one rank holds."""
    layout = model.layout
    elements = sum(
        _elements(unit)
        for unit in model.hf.units
        if unit.expert >= 0 and _stage_of(unit, model.layers) == stage
    )
    return elements // (layout.ep * layout.expert_tp)


def _stage_of(unit: "Unit", layers: Sequence[int]) -> int:
    if unit.layer < 0:
        return 0
    passed = 0
    for stage, count in enumerate(layers):
        passed += count
        if unit.layer < passed:
            return stage
    return len(layers) - 1  # after the last layer


def _elements(unit: "Unit") -> int:
    return sum(prod(shape) for shape in unit.hf_shapes)


def _shard_elements(unit: "Unit", tp: int) -> int:
    if unit.shard_axis < 0:
        return _elements(unit)
    if unit.megatron_name in VOCABULARY:
        rows, width = unit.hf_shapes[0]
        return padded_vocab_size(rows, tp) // tp * width
    return _elements(unit) // tp


def _plan_cost(run: ValidRun, prompt_lengths: Sequence[int]) -> CostPlan:
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
