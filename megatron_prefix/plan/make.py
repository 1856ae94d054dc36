"""What a recipe comes to: nothing is started and no weight is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from megatron_prefix.config import Recipe
from megatron_prefix.layout import Layout, padded_vocab_size
from megatron_prefix.plan.cost import CostPlan, plan_cost
from megatron_prefix.plan.fit import Fit
from megatron_prefix.plan.memory import RankPlan, Stage, plan_ranks
from megatron_prefix.plan.seen import Seen
from megatron_prefix.plan.servers import TeacherServers, teacher_servers
from megatron_prefix.plan.stages import whole_parameters
from megatron_prefix.types import Held
from megatron_prefix.validate import ValidModel, ValidRun


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
    context_parallel_size: int
    expert_model_parallel_size: int
    expert_tensor_parallel_size: int  # 0: it has no experts
    layers_by_stage: tuple[int, ...]
    groups: dict[str, tuple[tuple[int, ...], ...]]  # tp, cp, dp, pp: global ranks of each
    fp8_bytes_saved: int = 0  # activations kept for the backward, a packed token and rank

    @property
    def served(self) -> bool:
        """Whether it is on none of the ranks, but behind SGLang servers."""
        return not self.data_parallel_size


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    world_size: int
    student: ModelPlan
    teacher: ModelPlan
    built: bool  # bytes were counted on the very modules, not by arithmetic
    ranks: tuple[RankPlan, ...]
    cost: CostPlan
    shapes: tuple[str, ...] = ()  # files of shapes that stood in for folders not here yet
    fit: Fit | None = None  # None: the recipe does not say how much a card holds
    more_teachers: dict[str, ModelPlan] = field(default_factory=dict)  # by domain
    teacher_servers: tuple[TeacherServers, ...] = ()


def make_plan(
    run: ValidRun,
    seen: Seen | None = None,
    held: Mapping[Stage, Held] | None = None,
) -> Plan:
    """The plan of a validated run; ``seen``: what is known of its prompts, if anything; ``held``:
    what was counted on the modules of each stage, without which arithmetic does."""
    return Plan(
        recipe=run.recipe,
        world_size=run.world_size,
        student=replace(_plan_model(run.student), fp8_bytes_saved=_fp8_bytes_saved(run.student)),
        teacher=_plan_model(run.teacher),
        built=held is not None,
        ranks=plan_ranks(run, held),
        cost=plan_cost(run, seen or Seen()),
        more_teachers={name: _plan_model(model) for name, model in run.more_teachers.items()},
        teacher_servers=teacher_servers(run),
    )


def rank_groups(layout: Layout) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Global ranks of every tensor-, context-, data- and pipeline-parallel group, in rank order."""
    groups, stride = {}, 1
    for name in ("tp", "cp", "dp", "pp"):
        size = getattr(layout, name)
        groups[name] = tuple(
            tuple(range(rank, rank + stride * size, stride))
            for place, rank in enumerate(layout.ranks)
            if place // stride % size == 0
        )
        stride *= size
    return groups


def _fp8_bytes_saved(student: ValidModel) -> int:
    from megatron_prefix.mcore.fp8 import saved_activation_bytes

    return saved_activation_bytes(student.config, student.hf.shape, student.layers)


def _plan_model(model: ValidModel) -> ModelPlan:
    shape, layout = model.hf.shape, model.layout
    return ModelPlan(
        hf_path=str(model.hf.path),
        architecture=model.hf.config["architectures"][0],
        parameters=whole_parameters(model.hf),
        vocab_size=shape.vocab_size,
        padded_vocab_size=padded_vocab_size(shape.vocab_size, layout.tp),
        tensor_model_parallel_size=layout.tp,
        data_parallel_size=layout.dp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp if shape.num_experts else 0,
        layers_by_stage=model.layers,
        groups=rank_groups(layout),
    )
