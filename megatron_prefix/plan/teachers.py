"""What the teachers of a run take on a rank: several of them, anywhere, resident or offloaded.

Hidden states are counted for the worst that a step's domains can be: all of one teacher's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_prefix.config import Recipe
from megatron_prefix.modes import needs_teacher, section_of
from megatron_prefix.placement import IN_FLIGHT
from megatron_prefix.plan.activations import DTYPE_BYTES, scoring_peak, tokens_held
from megatron_prefix.validate import ValidModel, ValidRun

# (tp, dp, pp); nothing where the rank holds no part of a model.
Place = tuple[int, int, int] | tuple[()]
TOP_K_BYTES = 12  # of a token that a server names: int64 and float32 on the device
UNDER_WAY = IN_FLIGHT + 1  # microbatches of a separate teacher: posted ones, and the one in use


@dataclass(frozen=True)
class TeacherPart:
    """A rank's part of one teacher; sizes in bytes."""

    domain: str
    at: Place
    weights: int
    fp8: int  # copies of them; an estimate, as what follows
    activations: int  # of its forward, before the student's step
    offload: bool  # weights and copies are there for that forward alone

    @property
    def section(self) -> str:
        """Its section of the recipe."""
        return section_of(self.domain)

    @property
    def on_device(self) -> int:
        """While it scores."""
        return self.weights + self.fp8


def teachers_that_score(run: ValidRun) -> dict[str, ValidModel]:
    """By domain, those that are on ranks; none where no step asks one, and none is loaded."""
    return {domain: each for domain, each in _asked(run).items() if each.layout.world_size}


def _asked(run: ValidRun) -> dict[str, ValidModel]:
    """Those behind servers too."""
    return {"": run.teacher, **run.more_teachers} if needs_teacher(run.recipe) else {}


def place(model: ValidModel, rank: int) -> Place:
    """Where a rank stands in a model's grid."""
    return model.layout.coordinates(rank) if rank in model.layout.ranks else ()


def stage_at(place: Place) -> int:
    """-1 for a rank without a part of the model."""
    return place[2] if place else -1


def hidden_bytes(model: ValidModel) -> int:
    """Of one hidden state, or one row of the head."""
    return model.hf.shape.hidden_size * DTYPE_BYTES[model.config.params_dtype]


def scoring(run: ValidRun, teacher: ValidModel, stage: int, *, fused: bool) -> int:
    """Bytes of a teacher's forward of the largest microbatch; its prompts may be of another length
    than the student's."""
    recipe = run.recipe
    prompt = recipe.mode.teacher_prompt.max_length or recipe.data.max_prompt_length
    held = tokens_held(teacher.layout.cp, prompt + recipe.prefix.max_length - 1)
    tokens = recipe.train.micro_batch_size * held
    return round(scoring_peak(teacher, stage, tokens, fused=fused))


def hidden_states(run: ValidRun, stage: int, at: Mapping[str, int], in_a_step: int) -> int:
    """Bytes of teachers' hidden states on a rank of the student's ``stage`` and of the teachers'
    stages ``at``, by domain; ``in_a_step``: microbatches of one of the student's replicas.

    A colocated teacher's are there for a whole step, on its last stage for its own microbatches
    and on the student's for its; a separate one's a few microbatches at a time, unless the step
    goes over them twice; so is the top k of one behind servers, on the student's alone.
    """
    student, here, coming = run.student.layout, [0], 0
    # Every context-parallel rank of both has all of a microbatch's.
    positions = run.recipe.train.micro_batch_size * run.recipe.prefix.max_length
    learns = stage == student.pp - 1
    for domain, teacher in teachers_that_score(run).items():
        layout = teacher.layout
        replicas = [student.dp] * learns + [layout.dp] * (at[domain] == layout.pp - 1)
        if not replicas:
            continue
        microbatches = student.dp * in_a_step // min(replicas)
        if layout.first_rank and not (learns and _twice(run.recipe)):
            microbatches = min(microbatches, UNDER_WAY)
        size = microbatches * positions * hidden_bytes(teacher)
        if layout.first_rank and not _twice(run.recipe):
            coming += size
        else:
            here.append(size)
    for teacher in _asked(run).values():
        if learns and not teacher.layout.world_size:
            microbatches = in_a_step if _twice(run.recipe) else 1
            here.append(microbatches * positions * teacher.config.server.top_k * TOP_K_BYTES)
    return max(here) + coming


def _twice(recipe: Recipe) -> bool:
    """Whether a step, or a probe of gradients, keeps all of its targets."""
    probes = recipe.log.probe_interval > 0 and recipe.log.probe_agreement
    weights = recipe.loss.weights
    return weights.rule != "uniform" or weights.explore > 0 or probes
