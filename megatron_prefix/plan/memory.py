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
from megatron_prefix.modes import section_of
from megatron_prefix.plan.activations import (
    DTYPE_BYTES,
    Microbatch,
    kl_workspace,
    positions_held,
    tokens_held,
    training_peak,
)
from megatron_prefix.plan.stages import LayerSizes, layer_sizes, stage_parameters
from megatron_prefix.plan.teachers import (
    Place,
    TeacherPart,
    hidden_bytes,
    hidden_states,
    place,
    scoring,
    stage_at,
    teachers_that_score,
)
from megatron_prefix.types import Held
from megatron_prefix.validate import ValidModel, ValidRun

# Of a weight in FP8: Transformer Engine keeps one for the forward, a transposed one for the
# backward, and the bf16 weight besides (fp8_param is off).
FP8_COPIES = {"student": 2, "teacher": 1}
Stages = tuple[int, tuple[tuple[str, int], ...]]  # of the student, and of each teacher by domain


@dataclass(frozen=True)
class Stage:
    """One pipeline stage of a model: what a rank's modules follow from."""

    owner: Literal["student", "teacher"]
    number: int
    domain: str = ""  # of a teacher


@dataclass(frozen=True)
class Moment:
    """Bytes that a part of a step takes, beside what is held and the hidden states."""

    activations: int
    workspace: int = 0
    weights: int = 0  # of an offloaded teacher

    @property
    def total(self) -> int:
        return self.activations + self.workspace + self.weights


@dataclass(frozen=True)
class RankPlan:
    """What one rank holds; sizes in bytes."""

    rank: int
    student_at: Place
    teachers: tuple[TeacherPart, ...]  # that have a part on this rank
    student_parameters: int
    student_weights: int
    student_gradients: int
    student_optimizer: int
    student_fp8: int  # FP8 copies of its weights; an estimate
    teacher_head: int  # the LM heads' shards on the student's last stage
    activations: int  # the student's, at the worst moment of forward and backward; an estimate
    kl_workspace: int
    teacher_hidden: int  # teachers' hidden states of a step's prefix positions

    @property
    def teacher_weights(self) -> int:
        return sum(part.weights for part in self.teachers)

    @property
    def resident(self) -> int:
        """Of :attr:`teacher_weights`, what never leaves the device."""
        return sum(part.weights for part in self.teachers if not part.offload)

    @property
    def fp8_weights(self) -> int:
        """FP8 copies of the weights that never leave the device."""
        return self.student_fp8 + sum(part.fp8 for part in self.teachers if not part.offload)

    @property
    def in_host_memory(self) -> int:
        """Offloaded weights."""
        return self.teacher_weights - self.resident

    @property
    def held(self) -> int:
        """From the start to the end of the run."""
        student = self.student_weights + self.student_gradients + self.student_optimizer
        return student + self.resident + self.teacher_head + self.fp8_weights

    @property
    def worst(self) -> Moment:
        """Of a step: a teacher's forward, or the student's forward and backward."""
        moments = [Moment(self.activations, self.kl_workspace)]
        for part in self.teachers:
            moments.append(Moment(part.activations, 0, part.on_device if part.offload else 0))
        return max(moments, key=lambda moment: moment.total)

    @property
    def working(self) -> int:
        """At the worst moment of a step."""
        return self.teacher_hidden + self.worst.total

    @property
    def total(self) -> int:
        return self.held + self.working

    @property
    def saved_by_offload(self) -> int:
        """Bytes that the rank would need more with all teachers resident."""
        resident = tuple(replace(part, offload=False) for part in self.teachers)
        return replace(self, teachers=resident).total - self.total


def plan_ranks(run: ValidRun, held: Mapping[Stage, Held] | None = None) -> tuple[RankPlan, ...]:
    """Every rank of the world; ``held`` by arithmetic where it was not counted."""
    held = arithmetic(run) if held is None else held
    kinds: dict[Stages, RankPlan] = {}
    return tuple(_plan_rank(run, held, kinds, rank) for rank in range(run.world_size))


def _plan_rank(
    run: ValidRun, held: Mapping[Stage, Held], kinds: dict[Stages, RankPlan], rank: int
) -> RankPlan:
    """``kinds``: of those ranks that were planned before, which differ by their place alone and by
    their shard of the optimizer."""
    student, teachers = place(run.student, rank), teachers_that_score(run)
    at = {domain: place(teacher, rank) for domain, teacher in teachers.items()}
    kind = stage_at(student), tuple((domain, stage_at(there)) for domain, there in at.items())
    if kind not in kinds:
        kinds[kind] = _plan_kind(run, held, kind)
    one, layout = kinds[kind], run.student.layout
    optimizer = one.student_optimizer
    if student:
        shard = layout.expert_coordinates(rank)[2]
        optimizer = held[Stage("student", student[2])].optimizer_of(
            layout.replica_rank(rank), shard
        )
    return replace(
        one,
        rank=rank,
        student_at=student,
        student_optimizer=optimizer,
        teachers=tuple(replace(part, at=at[part.domain]) for part in one.teachers),
    )


def stages(run: ValidRun) -> list[Stage]:
    """Every stage of all models that are loaded."""
    found = [Stage("student", number) for number in range(run.student.layout.pp)]
    for domain, teacher in teachers_that_score(run).items():
        found += [Stage("teacher", number, domain) for number in range(teacher.layout.pp)]
    return found


def model_sizes(run: ValidRun) -> dict[str, dict[int, LayerSizes]]:
    """All models' layers by the recipe's sections; no layout changes them."""
    teachers = {section_of(name): model for name, model in teachers_that_score(run).items()}
    models = {"student": run.student, **teachers}
    return {section: layer_sizes(model.hf) for section, model in models.items()}


def arithmetic(
    run: ValidRun, sizes: Mapping[str, Mapping[int, LayerSizes]] | None = None
) -> dict[Stage, Held]:
    """What ``mcore/census.py`` counts, but for the padding of Megatron's buffers."""
    sizes = sizes or model_sizes(run)
    teachers = teachers_that_score(run)
    return {
        stage: _student_held(run, sizes["student"], stage.number)
        if stage.owner == "student"
        else _teacher_held(teachers[stage.domain], sizes[section_of(stage.domain)], stage.number)
        for stage in stages(run)
    }


def _student_held(run: ValidRun, sizes: Mapping[int, LayerSizes], stage: int) -> Held:
    student, optimizer = run.student, run.recipe.optimizer
    layout, width = student.layout, DTYPE_BYTES[student.config.params_dtype]
    parameters = stage_parameters(student, sizes, stage, with_head=True)
    states = parameters.total
    if optimizer.use_distributed_optimizer:
        # Experts are shared over the ranks that hold the same ones.
        states = -(-parameters.dense // layout.replicas) - (-parameters.experts // layout.expert_dp)
    return Held(
        parameters=parameters.total,
        weights=parameters.total * width,
        gradients=parameters.total * 4,
        optimizer=states * (12 if width == 2 else 8),
    )


def _teacher_held(teacher: ValidModel, sizes: Mapping[int, LayerSizes], stage: int) -> Held:
    parameters = stage_parameters(teacher, sizes, stage, with_head=False).total
    return Held(parameters, parameters * DTYPE_BYTES[teacher.config.params_dtype])


def _plan_kind(run: ValidRun, held: Mapping[Stage, Held], kind: Stages) -> RankPlan:
    """Of a rank of these stages; which rank it is, is filled in later."""
    stage, at = kind[0], dict(kind[1])
    student = held[Stage("student", stage)] if stage >= 0 else Held(0, 0)
    batch, learns = largest_microbatch(run.recipe, run.student.layout), _learning(run, stage)
    return RankPlan(
        rank=-1,
        student_at=(),
        teachers=tuple(
            TeacherPart(
                domain=domain,
                at=(),
                weights=held[Stage("teacher", at[domain], domain)].weights,
                fp8=_fp8_bytes(teacher, "teacher", held[Stage("teacher", at[domain], domain)]),
                activations=scoring(run, teacher, at[domain], fused=on_gpus(run.recipe)),
                offload=teacher.config.offload,
            )
            for domain, teacher in teachers_that_score(run).items()
            if at[domain] >= 0
        ),
        student_parameters=student.parameters,
        student_weights=student.weights,
        student_gradients=student.gradients,
        student_optimizer=student.optimizer,
        student_fp8=_fp8_bytes(run.student, "student", student),
        teacher_head=learns.head,
        activations=learns.activations,
        kl_workspace=learns.workspace,
        teacher_hidden=hidden_states(run, stage, at, batch.in_a_step),
    )


@dataclass(frozen=True)
class _Learning:
    """Bytes of the student's step."""

    activations: int = 0
    head: int = 0  # the teachers'
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
    heads = sum(rows * hidden_bytes(teacher) for teacher in teachers_that_score(run).values())
    chunk = run.recipe.loss.chunk_size
    workspace = kl_workspace(rows, batch.positions, ranks=tp, fused=fused, chunk_size=chunk)
    return _Learning(activations, heads, workspace)


def on_gpus(recipe: Recipe) -> bool:
    """Whether the recipe says what card it is for."""
    return recipe.run.gpu_memory_gib > 0


def largest_microbatch(recipe: Recipe, layout: Layout) -> Microbatch:
    """With every prompt and prefix at its bound."""
    prompt, prefix = recipe.data.max_prompt_length, recipe.prefix.max_length
    micro = recipe.train.micro_batch_size
    return Microbatch(
        tokens=micro * tokens_held(layout.cp, prompt + prefix - 1),
        positions=micro * positions_held(layout.cp, prompt, prefix),
        in_a_step=recipe.train.global_batch_size // micro // layout.dp,
        longest=prompt + prefix - 1,
    )


def _fp8_bytes(model: ValidModel, owner: str, held: Held) -> int:
    if model.config.fp8.format == "off":
        return 0
    return held.parameters * FP8_COPIES[owner]
