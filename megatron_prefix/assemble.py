"""Builds a trainer out of a recipe, on every rank alike; rank 0 gets a conductor besides."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from rich import get_console

from megatron_prefix.conductor import Conductor, Evaluator, Prober, Staff
from megatron_prefix.config import Recipe
from megatron_prefix.evaluate import EvalResult, evaluate, write_samples
from megatron_prefix.jsonl import EVALUATION_FOLDER
from megatron_prefix.lagged import LaggedTeacher
from megatron_prefix.mcore import fp8
from megatron_prefix.mcore.checkpoint import Checkpointer
from megatron_prefix.mcore.groups import (
    ModelGroups,
    create_groups,
    initialize_megatron,
    world_of,
)
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.model import DTYPES, MegatronModel, build_model
from megatron_prefix.mcore.optimizer import make_trainable
from megatron_prefix.mcore.saved_weights import load_saved_weights
from megatron_prefix.mcore.stop_map import exchange_rows
from megatron_prefix.mcore.weights import load_hf_weights
from megatron_prefix.modes import needs_servers, needs_teacher
from megatron_prefix.placement import world_layout
from megatron_prefix.prefix import Ledger, build_policy, model_shape
from megatron_prefix.prefix.recall import Recall
from megatron_prefix.publisher import (
    NoPublisher,
    ServerPublisher,
    backend_for,
)
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.collector import Collector
from megatron_prefix.rollout.fleet import Fleet
from megatron_prefix.run_log import RunLog
from megatron_prefix.stop_tokens import agreed_stop_ids, teacher_mapping
from megatron_prefix.student import Objective
from megatron_prefix.supplies import build_source, prompt_stream
from megatron_prefix.teacher import (
    ColocatedTeacher,
    Link,
    SeparateTeacher,
    Teacher,
    TeacherRank,
    load_teacher_head,
)
from megatron_prefix.teacher_loop import TeacherLoop
from megatron_prefix.tokenizers import load_tokenizer
from megatron_prefix.trainer import Parts, Publisher, Trainer
from megatron_prefix.types import Prompt, Rollout, TeacherHead
from megatron_prefix.watchdog import Watchdog

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
_WATCHDOG_SHARE = 0.9


@contextlib.contextmanager
def assemble(
    recipe: Recipe,
    folder: Path,
    endpoints: Sequence[Endpoint],
    stop_requested: Callable[[], bool],
) -> Iterator[Trainer | TeacherLoop]:
    """What this rank runs: a trainer, or the loop of a teacher that has ranks of its own.

    Collective; ``endpoints`` are rank 0's.
    """
    with contextlib.ExitStack() as stack:
        initialize_megatron(recipe.train.seed)
        world = _join(recipe)
        # Below the collectives' own timeout, which ends a rank without its stacks.
        patience_s = _WATCHDOG_SHARE * recipe.run.distributed_timeout_s
        watchdog = stack.enter_context(Watchdog(folder, dist.get_rank(), patience_s))
        if world.student is None:
            yield _teacher_loop(recipe, world, watchdog.beat)
            return
        stack.enter_context(world_of(world.student))
        student = _model(recipe, "student", world.student)
        trainable = make_trainable(student, recipe.optimizer, recipe.train.steps)
        fleet = _fleet(recipe, endpoints, stack)
        teacher = _teacher(recipe, world, student.groups)
        objective = Objective(recipe.loss, _agreed_head(recipe, student, world.device))
        yield Trainer(
            recipe,
            Parts(
                student=trainable,
                teacher=teacher,
                objective=objective,
                lagged=_lagged(recipe, student, teacher, objective, folder),
                publisher=_publisher(recipe, student, fleet, folder, stack),
                checkpointer=Checkpointer(folder / "checkpoints", trainable, recipe.checkpoint),
                conductor=_conductor(recipe, folder, endpoints, fleet, stop_requested, stack),
                host_group=world.host_group,
                device=world.device,
                export_folder=folder / "hf",
                token_multiple=token_multiple(recipe),
                watchdog=watchdog,
            ),
        )


@dataclass(frozen=True)
class _World:
    """What a rank has of the world: everything that is made by all ranks together."""

    student: ModelGroups | None  # None on the ranks of a separate teacher
    teacher: ModelGroups | None  # None on the student's ranks beside a separate teacher
    host_group: dist.ProcessGroup  # over gloo, whatever carries the tensors: orders live there
    link: Link | None  # of a separate teacher
    device: torch.device


def _join(recipe: Recipe) -> _World:
    """Every group, in one order on all ranks."""
    layout = world_layout(recipe, dist.get_world_size())
    student, teacher = create_groups(layout.student), create_groups(layout.teacher)
    host_group, link = dist.new_group(backend="gloo"), None
    assert isinstance(host_group, dist.ProcessGroup)  # every rank is a member
    if layout.separate:
        # A teacher that does not answer ends the run after this long.
        timeout = timedelta(seconds=recipe.run.distributed_timeout_s)
        group = dist.new_group(timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        width = read_hf_model(recipe.teacher.hf_path).shape.hidden_size
        link = Link(group, layout, _device(), DTYPES[recipe.teacher.params_dtype], width)
    return _World(student, teacher, host_group, link, _device())


def _teacher_loop(recipe: Recipe, world: _World, beat: Callable[[str], None]) -> TeacherLoop:
    assert world.link is not None and world.teacher is not None
    rank = TeacherRank(_model(recipe, "teacher", world.teacher), world.link)
    return TeacherLoop(rank, world.host_group, recipe.train, token_multiple(recipe), beat)


def _teacher(recipe: Recipe, world: _World, student: ModelGroups) -> Teacher | None:
    if not needs_teacher(recipe):
        return None
    if world.link is not None:
        return SeparateTeacher(world.link)
    assert world.teacher is not None
    model = _model(recipe, "teacher", world.teacher)
    return ColocatedTeacher(model, student.layout, world.device)


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _model(recipe: Recipe, owner: str, groups: ModelGroups) -> MegatronModel:
    config = getattr(recipe, owner)
    hf = read_hf_model(config.hf_path)
    model = build_model(config, hf, groups, owner=owner, with_head=owner == "student")
    if owner == "student" and recipe.checkpoint.load:
        load_saved_weights(model, recipe.checkpoint.load)
    else:
        load_hf_weights(model)
    return model


def _lagged(
    recipe: Recipe,
    student: MegatronModel,
    teacher: Teacher | None,
    objective: Objective,
    folder: Path,
) -> LaggedTeacher | None:
    every = recipe.mode.refresh_teacher_every
    if not every:
        return None
    assert isinstance(teacher, ColocatedTeacher), "validate refuses others"
    return LaggedTeacher(student, teacher, objective.teacher_head, folder, every)


def _agreed_head(
    recipe: Recipe, student: MegatronModel, device: torch.device
) -> TeacherHead | None:
    """The teacher's head, with the student's stop tokens where the recipe maps its own to them."""
    head, mapping = _teacher_head(recipe, student, device), teacher_mapping(recipe)
    if head is not None and mapping:
        teacher = read_hf_model(recipe.teacher.hf_path)
        exchange_rows(head.weight, teacher, student.groups.tp_rank, mapping)
    return head


def _teacher_head(
    recipe: Recipe, student: MegatronModel, device: torch.device
) -> TeacherHead | None:
    if not student.groups.is_last_stage or not needs_teacher(recipe):
        return None
    teacher = recipe.teacher
    dtype = DTYPES[teacher.params_dtype]
    return load_teacher_head(student, read_hf_model(teacher.hf_path), dtype, device)


def token_multiple(recipe: Recipe) -> int:
    """Packed microbatches are padded to this many tokens: sequence parallelism cuts them in
    tensor-parallel parts, blockwise FP8 wants multiples of 128."""
    multiple = 1
    for model in (recipe.student, recipe.teacher):
        parts = model.tensor_model_parallel_size if model.sequence_parallel else 1
        width = fp8.SEQUENCE_MULTIPLE if model.fp8.format != "off" else 1
        multiple = math.lcm(multiple, parts * width)
    return multiple


def _publisher(
    recipe: Recipe,
    student: MegatronModel,
    fleet: Fleet | None,
    folder: Path,
    stack: contextlib.ExitStack,
) -> Publisher:
    if not needs_servers(recipe):
        return NoPublisher()
    if fleet is not None:
        logger.info("waiting for %d SGLang server(s)", len(fleet.members))
        fleet.meet()
    backend = backend_for(_device())
    publisher = ServerPublisher(student, recipe.rollout, fleet, backend, folder / "sync")
    stack.callback(publisher.close)
    return publisher


def _fleet(
    recipe: Recipe, endpoints: Sequence[Endpoint], stack: contextlib.ExitStack
) -> Fleet | None:
    """Rank 0's; None on the others, and where rollouts are replayed."""
    if not needs_servers(recipe) or not endpoints:
        return None
    fleet = Fleet(endpoints, recipe.rollout)
    stack.callback(fleet.close)
    return fleet


def _conductor(
    recipe: Recipe,
    folder: Path,
    endpoints: Sequence[Endpoint],
    fleet: Fleet | None,
    stop_requested: Callable[[], bool],
    stack: contextlib.ExitStack,
) -> Conductor | None:
    if dist.get_rank() != 0:
        return None
    tokenizer = load_tokenizer(recipe.student.hf_path)
    stops = agreed_stop_ids(recipe)
    student, teacher = (
        model_shape(read_hf_model(m.hf_path).config) for m in (recipe.student, recipe.teacher)
    )
    recall = Recall(recipe.prefix.recall) if recipe.prefix.recall.threshold else None
    conductor = Conductor(
        recipe,
        Staff(
            policy=build_policy(recipe.prefix, recipe.train.steps),
            source=build_source(recipe, folder, endpoints, stops, tokenizer, recall, stack, fleet),
            recall=recall,
            ledger=Ledger(
                student,
                teacher,
                recipe.prefix.max_length,
                teacher_heads=1 if recipe.loss.weights.rule == "uniform" else 2,
            ),
            open_log=lambda step: RunLog(
                folder, recipe.log, recipe.train.steps, console=get_console(), resume_step=step
            ),
            decode=tokenizer.decode,
            evaluate=_evaluator(recipe, folder, endpoints, fleet, stops, tokenizer, stack),
            probe=_prober(recipe, endpoints, fleet, stops, tokenizer, stack),
            stop_requested=stop_requested,
            fleet=fleet,
        ),
    )
    stack.callback(conductor.close)
    return conductor


def _evaluator(
    recipe: Recipe,
    folder: Path,
    endpoints: Sequence[Endpoint],
    fleet: Fleet | None,
    stops: tuple[int, ...],
    tokenizer: "PreTrainedTokenizerBase",
    stack: contextlib.ExitStack,
) -> Evaluator | None:
    if not recipe.eval.path or not endpoints:
        return None
    greedy = replace(recipe.rollout, temperature=0.0, samples_per_prompt=1, over_sample=1.0)
    collector = stack.enter_context(Collector(endpoints, greedy, stops, roster=fleet))

    def run(step: int, policy_version: int) -> EvalResult:
        def answers(prompts: Sequence[Prompt], max_new_tokens: int) -> list[Rollout]:
            collected = collector.collect(
                prompts, max_new_tokens=max_new_tokens, policy_version=policy_version
            )
            return collected.rollouts

        result = evaluate(recipe.eval, tokenizer, answers, recipe.data)
        write_samples(folder / EVALUATION_FOLDER / f"step_{step:08d}.jsonl", result.samples)
        return result

    return run


def _prober(
    recipe: Recipe,
    endpoints: Sequence[Endpoint],
    fleet: Fleet | None,
    stops: tuple[int, ...],
    tokenizer: "PreTrainedTokenizerBase",
    stack: contextlib.ExitStack,
) -> Prober | None:
    """The same prompts each time, from an order of their own: the training's is not moved on."""
    if not recipe.log.probe_interval or not endpoints:
        return None
    single = replace(recipe.rollout, samples_per_prompt=1, over_sample=1.0)
    collector = stack.enter_context(Collector(endpoints, single, stops, roster=fleet))
    data = replace(recipe.data, seed=recipe.data.seed + 1)
    prompts = prompt_stream(recipe, data, tokenizer).take(recipe.log.probe_rollouts)

    def run(policy_version: int) -> list[Rollout]:
        length = recipe.prefix.max_length
        return collector.collect(
            prompts, max_new_tokens=length, policy_version=policy_version
        ).rollouts

    return run
