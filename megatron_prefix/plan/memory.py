"""Bytes of every rank.

Parameters, gradients and optimizer are what Megatron-Core allocates: weights in params_dtype,
gradients in fp32, Adam's two moments and, beside bf16 weights, an fp32 copy, sharded over
data-parallel ranks with the distributed optimizer. What works on them is estimated
(``activations.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from megatron_prefix.config import Recipe
from megatron_prefix.layout import Layout, padded_vocab_size
from megatron_prefix.plan.activations import (
    DTYPE_BYTES,
    Microbatch,
    kl_workspace,
    scoring_peak,
    training_peak,
)
from megatron_prefix.plan.stages import LayerSizes, layer_sizes, stage_parameters
from megatron_prefix.types import Held
from megatron_prefix.validate import ValidModel, ValidRun

# Of a weight in FP8: Transformer Engine keeps one for the forward, a transposed one for the
# backward, and the bf16 weight besides (fp8_param is off).
FP8_COPIES = {"student": 2, "teacher": 1}
# Hidden states on their way from a separate teacher, and those in use (``teacher.py``).
MICROBATCHES_UNDER_WAY = 3
# (tp, dp, pp); nothing where the rank holds no part of it, beside a separate teacher.
Place = tuple[int, int, int] | tuple[()]
Stages = tuple[int, int]  # of student and teacher; -1: no part of it


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of a model: what a rank's modules follow from."""

    owner: Literal["student", "teacher"]
    number: int


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds; sizes in bytes."""

    rank: int
    student_at: Place
    teacher_at: Place
    student_parameters: int
    student_weights: int
    student_gradients: int
    student_optimizer: int
    teacher_weights: int
    teacher_head: int  # the LM head's shard on the student's last stage
    fp8_weights: int  # FP8 copies of both models' weights; an estimate, as all that follows
    activations: int  # the student's, at the worst moment of forward and backward
    kl_workspace: int
    teacher_hidden: int  # the teacher's hidden states of a step's prefix positions
    teacher_activations: int  # of its forward, before the student's step

    @property
    def held(self) -> int:
        """From the start to the end of the run."""
        return (
            self.student_weights
            + self.student_gradients
            + self.student_optimizer
            + self.teacher_weights
            + self.teacher_head
            + self.fp8_weights
        )

    @property
    def working(self) -> int:
        """At the worst moment of a step: the teacher's forward, or the student's step."""
        student = self.activations + self.kl_workspace
        return self.teacher_hidden + max(student, self.teacher_activations)

    @property
    def total(self) -> int:
        return self.held + self.working


def plan_ranks(run: ValidRun, held: Mapping[Stage, Held] | None = None) -> tuple[RankPlan, ...]:
    """Every rank of the world; ``held`` by arithmetic where it was not counted."""
    held = arithmetic(run) if held is None else held
    kinds: dict[Stages, RankPlan] = {}
    ranks = []
    for rank in range(run.world_size):
        student, teacher = (place(model, rank) for model in (run.student, run.teacher))
        kind = stage_at(student), stage_at(teacher)
        if kind not in kinds:
            kinds[kind] = _plan_rank(run, held, kind)
        ranks.append(replace(kinds[kind], rank=rank, student_at=student, teacher_at=teacher))
    return tuple(ranks)


def place(model: ValidModel, rank: int) -> Place:
    """Where a rank stands in a model's grid."""
    return model.layout.coordinates(rank) if rank in model.layout.ranks else ()


def stage_at(place: Place) -> int:
    """-1 for a rank without a part of the model."""
    return place[2] if place else -1


def stages(run: ValidRun) -> list[Stage]:
    """Every stage of both models."""
    students = [Stage("student", number) for number in range(run.student.layout.pp)]
    return students + [Stage("teacher", number) for number in range(run.teacher.layout.pp)]


def model_sizes(run: ValidRun) -> dict[str, dict[int, LayerSizes]]:
    """Both models' layers, which no layout changes."""
    return {"student": layer_sizes(run.student.hf), "teacher": layer_sizes(run.teacher.hf)}


def arithmetic(
    run: ValidRun, sizes: Mapping[str, Mapping[int, LayerSizes]] | None = None
) -> dict[Stage, Held]:
    """What ``mcore/census.py`` counts, but for the padding of Megatron's buffers."""
    sizes = sizes or model_sizes(run)
    return {
        stage: _student_held(run, sizes["student"], stage.number)
        if stage.owner == "student"
        else _teacher_held(run, sizes["teacher"], stage.number)
        for stage in stages(run)
    }


def _student_held(run: ValidRun, sizes: Mapping[int, LayerSizes], stage: int) -> Held:
    student, optimizer = run.student, run.recipe.optimizer
    layout, width = student.layout, DTYPE_BYTES[student.config.params_dtype]
    parameters = stage_parameters(student, sizes, stage, with_head=True)
    states = parameters.total
    if optimizer.use_distributed_optimizer:
        # Experts are shared over the ranks that hold the same ones.
        states = -(-parameters.dense // layout.dp) - (-parameters.experts // layout.expert_dp)
    return Held(
        parameters=parameters.total,
        weights=parameters.total * width,
        gradients=parameters.total * 4,
        optimizer=states * (12 if width == 2 else 8),
    )


def _teacher_held(run: ValidRun, sizes: Mapping[int, LayerSizes], stage: int) -> Held:
    parameters = stage_parameters(run.teacher, sizes, stage, with_head=False).total
    return Held(parameters, parameters * DTYPE_BYTES[run.teacher.config.params_dtype])


def _plan_rank(run: ValidRun, held: Mapping[Stage, Held], kind: Stages) -> RankPlan:
    """Of a rank of these stages; which rank it is, is filled in later."""
    student = held[Stage("student", kind[0])] if kind[0] >= 0 else Held(0, 0)
    teacher = held[Stage("teacher", kind[1])] if kind[1] >= 0 else Held(0, 0)
    learns = _learning(run, kind[0])
    return RankPlan(
        rank=-1,
        student_at=(),
        teacher_at=(),
        student_parameters=student.parameters,
        student_weights=student.weights,
        student_gradients=student.gradients,
        student_optimizer=student.optimizer,
        teacher_weights=teacher.weights,
        teacher_head=learns.head,
        fp8_weights=_fp8_bytes(run.student, "student", student)
        + _fp8_bytes(run.teacher, "teacher", teacher),
        activations=learns.activations,
        kl_workspace=learns.workspace,
        teacher_hidden=_hidden_states(run, kind),
        teacher_activations=_scoring(run, kind[1]),
    )


@dataclass(frozen=True)
class _Learning:
    """Bytes of the student's step."""

    activations: int = 0
    head: int = 0  # the teacher's
    workspace: int = 0


def _learning(run: ValidRun, stage: int) -> _Learning:
    if stage < 0:
        return _Learning()
    student = run.student
    batch, fused = largest_microbatch(run.recipe, student.layout), on_gpus(run.recipe)
    activations = round(training_peak(student, stage, batch, fused=fused))
    if stage < student.layout.pp - 1:
        return _Learning(activations)
    tp = student.layout.tp
    rows = padded_vocab_size(student.hf.shape.vocab_size, tp) // tp
    workspace = kl_workspace(rows, batch.positions, ranks=tp, fused=fused)
    return _Learning(activations, rows * _hidden_bytes(run.teacher), workspace)


def _scoring(run: ValidRun, stage: int) -> int:
    if stage < 0:
        return 0
    batch = largest_microbatch(run.recipe, run.student.layout)
    return round(scoring_peak(run.teacher, stage, batch.tokens))


def on_gpus(recipe: Recipe) -> bool:
    """Whether the recipe says what card it is for."""
    return recipe.run.gpu_memory_gib > 0


def largest_microbatch(recipe: Recipe, layout: Layout) -> Microbatch:
    """With every prompt and prefix at its bound."""
    prompt, prefix = recipe.data.max_prompt_length, recipe.prefix.max_length
    micro = recipe.train.micro_batch_size
    return Microbatch(
        tokens=micro * (prompt + prefix - 1),
        positions=micro * prefix,
        in_a_step=recipe.train.global_batch_size // micro // layout.dp,
    )


def _hidden_bytes(model: ValidModel) -> int:
    """Of one hidden state, or one row of the head."""
    return model.hf.shape.hidden_size * DTYPE_BYTES[model.config.params_dtype]


def _hidden_states(run: ValidRun, kind: Stages) -> int:
    """A colocated teacher's are there for a whole step, on its last stage for its own microbatches
    and on the student's for its; a separate teacher's a few microbatches at a time."""
    student, teacher = run.student.layout, run.teacher.layout
    batch = largest_microbatch(run.recipe, student)
    replicas = [
        model.dp
        for model, stage in zip((student, teacher), kind, strict=True)
        if stage == model.pp - 1
    ]
    if not replicas:
        return 0
    microbatches = student.dp * batch.in_a_step // min(replicas)
    if teacher.first_rank:
        microbatches = min(microbatches, MICROBATCHES_UNDER_WAY)
    return microbatches * batch.positions * _hidden_bytes(run.teacher)


def _fp8_bytes(model: ValidModel, owner: str, held: Held) -> int:
    if model.config.fp8.format == "off":
        return 0
    return held.parameters * FP8_COPIES[owner]
