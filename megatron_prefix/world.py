"""The world of a recipe as one rank sees it: groups of all models, teachers and their heads."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_prefix.config import ModelConfig, Recipe
from megatron_prefix.data.stop_tokens import teacher_mapping
from megatron_prefix.health.watchdog import Watchdog
from megatron_prefix.mcore import fp8
from megatron_prefix.mcore.groups import ModelGroups, create_groups
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.model import DTYPES, MegatronModel, build_model
from megatron_prefix.mcore.saved_weights import load_saved_weights
from megatron_prefix.mcore.stop_map import exchange_rows
from megatron_prefix.mcore.weights import load_hf_weights
from megatron_prefix.modes import needs_teacher, section_of, teachers_of
from megatron_prefix.orders import order_group
from megatron_prefix.placement import WorldLayout, world_layout
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.student import Objective
from megatron_prefix.teacher import (
    ColocatedTeacher,
    Link,
    SeparateTeacher,
    SeveralTeachers,
    Teacher,
    TeacherRank,
    load_teacher_head,
)
from megatron_prefix.teachers.loop import TeacherLoop
from megatron_prefix.teachers.reach import reach_teacher, shared_vocabulary
from megatron_prefix.types import TeacherHead


@dataclass(frozen=True)
class World:
    """What a rank has of the world: everything that is made by all ranks together."""

    student: ModelGroups | None  # None on the ranks of a separate teacher
    # By domain, of the teachers that this rank has a part of.
    teachers: dict[str, ModelGroups]
    host_group: dist.ProcessGroup  # over gloo, whatever carries the tensors: orders live there
    links: dict[str, Link]  # of the separate teachers, by domain
    layout: WorldLayout
    device: torch.device


def join(recipe: Recipe) -> World:
    """Make every process group, in one order on all ranks. Collective over the world.

    ValueError where the recipe's layouts do not fill it.
    """
    layout = world_layout(recipe, dist.get_world_size())
    timeout = collective_timeout(recipe)
    student = create_groups(layout.student, timeout)
    host_group = order_group(timeout)
    teachers, links = {}, {}
    for domain, teacher in teachers_of(recipe).items():
        if layout.served(domain):
            continue
        groups = create_groups(layout.teachers[domain], timeout)
        if groups is not None:
            teachers[domain] = groups
        if layout.separate(domain):
            # A teacher that does not answer ends the run after this long.
            group = dist.new_group(timeout=timeout)
            assert isinstance(group, dist.ProcessGroup)
            width = read_hf_model(teacher.hf_path).shape.hidden_size
            dtype = DTYPES[teacher.params_dtype]
            links[domain] = Link(group, layout, this_device(), dtype, width, domain)
    return World(student, teachers, host_group, links, layout, this_device())


def collective_timeout(recipe: Recipe) -> timedelta:
    """How long a rank waits for the others in any group but that of the orders, in which rank 0 may
    take its time, and that with the servers."""
    return timedelta(seconds=recipe.run.distributed_timeout_s)


def teacher_loop(recipe: Recipe, world: World, watchdog: Watchdog) -> TeacherLoop:
    """Of the one teacher that has this rank to itself. Collective over that teacher's ranks."""
    ((domain, groups),) = world.teachers.items()
    model = load_model(teachers_of(recipe)[domain], section_of(domain), groups)
    teacher = TeacherRank(model, world.links[domain])
    packing = token_multiple(recipe), world.layout.student.dp
    return TeacherLoop(teacher, world.host_group, recipe.train, *packing, watchdog)


def build_teacher(
    recipe: Recipe,
    world: World,
    student: MegatronModel,
    servers: Mapping[str, Sequence[Endpoint]],
    stack: contextlib.ExitStack,
) -> Teacher | None:
    """What the student's ranks ask for targets; None where no step does. ``servers``: of teachers
    that are behind any, by domain, on every rank. Collective over the student's ranks."""
    if not needs_teacher(recipe):
        return None
    found: dict[str, Teacher] = {}
    for domain, config in teachers_of(recipe).items():
        if world.layout.served(domain):
            found[domain] = reach_teacher(
                recipe, domain, servers[domain], student, world.device, stack
            )
        elif domain in world.links:
            found[domain] = SeparateTeacher(world.links[domain])
        else:
            model = load_model(config, section_of(domain), world.teachers[domain])
            layout = student.groups.layout
            found[domain] = ColocatedTeacher(
                model, layout, world.device, domain, offload=config.offload
            )
    return SeveralTeachers(found, student.groups) if len(found) > 1 else found[""]


def this_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def load_model(
    config: ModelConfig, owner: str, groups: ModelGroups, checkpoint: str = ""
) -> MegatronModel:
    """This rank's part of a model with its weights, a checkpoint's or else its folder's.

    ``owner`` is its section of the recipe.
    """
    hf = read_hf_model(config.hf_path)
    model = build_model(config, hf, groups, owner=owner, with_head=owner == "student")
    if checkpoint:
        load_saved_weights(model, checkpoint)
    else:
        load_hf_weights(model)
    return model


def build_objective(recipe: Recipe, student: MegatronModel, device: torch.device) -> Objective:
    """With every teacher's LM head, on the student's last stage."""
    heads: dict[str, TeacherHead] = {}
    common: dict[str, int] = {}
    if student.groups.is_last_stage and needs_teacher(recipe):
        for domain, teacher in teachers_of(recipe).items():
            if teacher.placement == "server":
                common[domain] = shared_vocabulary(recipe, domain, student).common
                continue
            dtype = DTYPES[teacher.params_dtype]
            hf = read_hf_model(teacher.hf_path)
            heads[domain] = load_teacher_head(student, hf, dtype, device)
            # The student's stop tokens, where the recipe maps the teacher's own to them.
            exchange_rows(heads[domain].weight, hf, student.groups.tp_rank, teacher_mapping(recipe))
    return Objective(
        recipe.loss,
        heads.pop("", None),
        more_heads=heads,
        common_vocabulary=common,
        overlap_k=recipe.prefix.overlap_k,
        keeps=recipe.prefix.recall.signal,
    )


def token_multiple(recipe: Recipe) -> int:
    """Packed microbatches are padded to this many tokens: sequence parallelism cuts them in
    tensor-parallel parts, blockwise FP8 wants multiples of 128."""
    multiple = 1
    for model in (recipe.student, *teachers_of(recipe).values()):
        parts = model.tensor_model_parallel_size if model.sequence_parallel else 1
        width = fp8.SEQUENCE_MULTIPLE if model.fp8.format != "off" else 1
        multiple = math.lcm(multiple, parts * width)
    return multiple
