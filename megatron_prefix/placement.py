"""Who stands where in one world: the student on its first ranks, the teacher on the same ones or
behind them. Pure arithmetic, no torch."""

import math
from dataclasses import dataclass

from megatron_prefix.config import ModelConfig, Recipe
from megatron_prefix.layout import Layout, least_world_size, model_layout
from megatron_prefix.modes import needs_teacher


@dataclass(frozen=True)
class WorldLayout:
    """Both grids of a world."""

    student: Layout
    teacher: Layout

    @property
    def separate(self) -> bool:
        """Whether the teacher has ranks of its own."""
        return self.teacher.first_rank > 0


def world_layout(recipe: Recipe, world_size: int) -> WorldLayout:
    """Both grids over ``world_size`` ranks; ValueError where they do not divide."""
    student, teacher = recipe.student, recipe.teacher
    own = teacher_ranks(teacher)
    if not own:
        return WorldLayout(model_layout(student, world_size), model_layout(teacher, world_size))
    rest = world_size - own
    if rest < 1:
        raise ValueError(
            f"world size {world_size} leaves no rank to the student beside the teacher's {own}; "
            f"start {least_world_size(student) + own} ranks"
        )
    return WorldLayout(model_layout(student, rest), model_layout(teacher, own, first_rank=rest))


def teacher_ranks(teacher: ModelConfig) -> int:
    """Ranks that a teacher has to itself; 0 where it shares the student's."""
    if teacher.placement == "colocated":
        return 0
    return teacher.world_size or least_world_size(teacher)


@dataclass(frozen=True)
class Route:
    """One microbatch's way from a teacher's last stage to a student's."""

    microbatch: int
    pairs: tuple[tuple[int, int], ...]  # (sender, receiver): global ranks, one for each receiver


def routes(count: int, student: Layout, teacher: Layout) -> list[Route]:
    """Where each of ``count`` microbatches goes, in the order in which all ranks take them.

    First the first microbatch of every student replica, then the second of each: replicas advance
    together, and no two ranks ever wait for each other. The teacher's replica ``r`` scores every
    ``teacher.dp``-th of the list from ``r`` on.
    """
    share = count // student.dp
    taken = [(dp, dp * share + at) for at in range(share) for dp in range(student.dp)]
    found = []
    for place, (replica, microbatch) in enumerate(taken):
        senders = teacher.last_stage(place % teacher.dp)
        receivers = student.last_stage(replica)
        pairs = tuple(
            (receiver if receiver in senders else senders[index % len(senders)], receiver)
            for index, receiver in enumerate(receivers)
        )
        found.append(Route(microbatch, pairs))
    return found


def resolve_world_size(recipe: Recipe) -> int:
    """``run.world_size``, or the least number of ranks that the layouts need: one that both divide,
    and a separate teacher's on top of the student's."""
    student, teacher = least_world_size(recipe.student), least_world_size(recipe.teacher)
    own, asked = teacher_ranks(recipe.teacher), recipe.run.world_size
    if own:
        return _beside_a_teacher(asked, student, own)
    least = math.lcm(student, teacher)
    if asked % least:
        raise ValueError(
            f"run.world_size={asked} must be a multiple of tensor*pipeline parallel of the student "
            f"({student}) and of the teacher ({teacher}); try "
            f"{nearest_multiples(asked, least)}"
        )
    return asked or least


def _beside_a_teacher(asked: int, student: int, teacher: int) -> int:
    rest = asked - teacher
    if asked and (rest < 1 or rest % student):
        near = [teacher + max(1, rest // student + more) * student for more in (0, 1)]
        raise ValueError(
            f"run.world_size={asked} must be the {teacher} ranks of the separate teacher and a "
            f"multiple of the student's tensor*pipeline parallel={student}; try "
            f"{' or '.join(str(size) for size in sorted(set(near)))}"
        )
    return asked or student + teacher


def check_placement(recipe: Recipe) -> None:
    """ValueError for a placement that names ranks which it cannot have."""
    student, teacher = recipe.student, recipe.teacher
    if student.placement != "colocated" or student.world_size:
        raise ValueError(
            f"student.placement={student.placement} and student.world_size={student.world_size} "
            "are settings of a teacher; leave them out, run.world_size counts all ranks"
        )
    if teacher.world_size and teacher.placement == "colocated":
        raise ValueError(
            f"teacher.world_size={teacher.world_size} needs teacher.placement=separate; a "
            "colocated teacher is on the student's ranks"
        )
    if teacher.placement != "colocated" and not needs_teacher(recipe):
        raise ValueError(
            f"teacher.placement={teacher.placement}, but no step of mode.name={recipe.mode.name} "
            "asks the teacher; leave it colocated"
        )
    least = least_world_size(teacher)
    if teacher.world_size % least:
        raise ValueError(
            f"teacher.world_size={teacher.world_size} must be a multiple of {least}, the ranks "
            f"that hold its layout once; try {nearest_multiples(teacher.world_size, least)}"
        )


def nearest_multiples(value: int, multiple: int) -> str:
    """The multiples around ``value``, for a remedy."""
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below else f"{multiple}"
