"""Who stands where in one world: the student on its first ranks, the teacher on the same ones or
behind them. Pure arithmetic, no torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_prefix.config import ModelConfig, Recipe, TeacherServerConfig
from megatron_prefix.layout import Layout, least_world_size, model_layout
from megatron_prefix.modes import needs_teacher, section_of, teachers_of

# Microbatches on their way from a separate teacher: what a rank keeps posted to receive, or to
# send. One is used while the other comes in.
IN_FLIGHT = 2
# The grid of a teacher behind servers: none of the world's ranks.
NOWHERE = Layout(tp=1, dp=0, pp=1)


@dataclass(frozen=True)
class WorldLayout:
    """All grids of a world; teachers go by their domain, the recipe's ``teacher`` by ""."""

    student: Layout
    teachers: Mapping[str, Layout]

    @property
    def teacher(self) -> Layout:
        return self.teachers[""]

    def separate(self, domain: str = "") -> bool:
        """Whether a teacher has ranks of its own."""
        return self.teachers[domain].first_rank > 0

    def served(self, domain: str = "") -> bool:
        """Whether a teacher is behind servers and has no rank at all."""
        return not self.teachers[domain].world_size


def world_layout(recipe: Recipe, world_size: int) -> WorldLayout:
    """All grids over ``world_size`` ranks; ValueError where they do not divide."""
    own = {domain: teacher_ranks(teacher) for domain, teacher in teachers_of(recipe).items()}
    rest = world_size - sum(own.values())
    if rest < 1:
        raise ValueError(
            f"world size {world_size} leaves no rank to the student beside its teachers' "
            f"{sum(own.values())}; start {least_world_size(recipe.student) + sum(own.values())}"
        )
    teachers, first_rank = {}, rest
    for domain, teacher in teachers_of(recipe).items():
        if teacher.placement == "server":
            teachers[domain] = NOWHERE
        elif own[domain]:
            teachers[domain] = model_layout(teacher, own[domain], first_rank)
            first_rank += own[domain]
        else:
            teachers[domain] = model_layout(teacher, rest)
    return WorldLayout(model_layout(recipe.student, rest), teachers)


def teacher_ranks(teacher: ModelConfig) -> int:
    """Ranks that a teacher has to itself; 0 where it shares the student's, or has none."""
    if teacher.placement != "separate":
        return 0
    return teacher.world_size or least_world_size(teacher)


@dataclass(frozen=True)
class Route:
    """One microbatch's way from a teacher's last stage to a student's."""

    microbatch: int
    pairs: tuple[tuple[int, int], ...]  # (sender, receiver): global ranks, one for each receiver


def routes(
    count: int, student: Layout, teacher: Layout, taken: Callable[[int], bool] = lambda _: True
) -> list[Route]:
    """Where each of ``count`` microbatches goes, in the order in which all ranks take them.

    First the first microbatch of every student replica, then the second of each: replicas advance
    together, and no two ranks ever wait for each other. Of several teachers each has the
    microbatches for which ``taken`` is true; its replica ``r`` scores every ``teacher.dp``-th of
    the list from ``r`` on.
    """
    share = count // student.dp
    turns = [(dp, dp * share + at) for at in range(share) for dp in range(student.dp)]
    turns = [(dp, microbatch) for dp, microbatch in turns if taken(microbatch)]
    found = []
    for place, (replica, microbatch) in enumerate(turns):
        senders = teacher.last_stage(place % teacher.dp)
        receivers = student.last_stage(replica)
        pairs = tuple(
            (receiver if receiver in senders else senders[index % len(senders)], receiver)
            for index, receiver in enumerate(receivers)
        )
        found.append(Route(microbatch, pairs))
    return found


def resolve_world_size(recipe: Recipe) -> int:
    """``run.world_size``, or the least number of ranks that the layouts need: one that the
    student's and all colocated teachers' divide, and the separate teachers' on top of it."""
    sizes = {"the student": least_world_size(recipe.student)}
    own, asked = 0, recipe.run.world_size
    for domain, teacher in teachers_of(recipe).items():
        own += teacher_ranks(teacher)
        if teacher.placement == "colocated":
            name = f"the teacher of {domain}" if domain else "the teacher"
            sizes[name] = least_world_size(teacher)
    least = math.lcm(*sizes.values())
    if asked and (asked <= own or (asked - own) % least):
        parts = " and of ".join(f"{name} ({size})" for name, size in sizes.items())
        near = [own + max(1, (asked - own) // least + more) * least for more in (0, 1)]
        beside = f"{own} ranks of separate teachers and " if own else ""
        raise ValueError(
            f"run.world_size={asked} must be {beside}a multiple of tensor*pipeline parallel of "
            f"{parts}; try {' or '.join(str(size) for size in sorted(set(near)))}"
        )
    return asked or own + least


def check_placement(recipe: Recipe) -> None:
    """ValueError for a placement that names ranks which it cannot have, and for teachers that no
    prompt could name."""
    student = recipe.student
    if student.server != TeacherServerConfig():
        raise ValueError("student.server has settings of a teacher; leave it out")
    if student.placement != "colocated" or student.world_size:
        raise ValueError(
            f"student.placement={student.placement} and student.world_size={student.world_size} "
            "are settings of a teacher; leave them out, run.world_size counts all ranks"
        )
    if student.offload:
        raise ValueError("student.offload=true is a setting of a teacher; leave it out")
    if bool(recipe.teachers) != bool(recipe.data.domain_column):
        raise ValueError(
            f"data.domain_column={recipe.data.domain_column!r} names each prompt's teacher, and "
            f"teachers has {', '.join(sorted(recipe.teachers)) or 'none'}; give both or neither"
        )
    for domain, teacher in teachers_of(recipe).items():
        if domain == "teacher":
            raise ValueError("teachers.teacher: that is the name of the section teacher's; rename")
        _check_teacher(recipe, teacher, section_of(domain))


def _check_teacher(recipe: Recipe, teacher: ModelConfig, section: str) -> None:
    if teacher.world_size and teacher.placement != "separate":
        raise ValueError(
            f"{section}.world_size={teacher.world_size} needs {section}.placement=separate; a "
            f"{teacher.placement} teacher has no ranks of its own"
        )
    if teacher.offload and teacher.placement != "colocated":
        where = "has its ranks to itself" if teacher_ranks(teacher) else "is behind servers"
        raise ValueError(
            f"{section}.offload=true with {section}.placement={teacher.placement}: a teacher that "
            f"{where} makes room for nobody; set it to false"
        )
    if teacher.placement != "colocated" and not needs_teacher(recipe):
        raise ValueError(
            f"{section}.placement={teacher.placement}, but no step of mode.name={recipe.mode.name} "
            "asks the teacher; leave it colocated"
        )
    least = least_world_size(teacher)
    if teacher.world_size % least:
        raise ValueError(
            f"{section}.world_size={teacher.world_size} must be a multiple of {least}, the ranks "
            f"that hold its layout once; try {nearest_multiples(teacher.world_size, least)}"
        )


def nearest_multiples(value: int, multiple: int) -> str:
    """The multiples around ``value``, for a remedy."""
    below = value // multiple * multiple
    return f"{below} or {below + multiple}" if below else f"{multiple}"
