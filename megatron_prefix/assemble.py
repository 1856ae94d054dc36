"""Builds a trainer out of a recipe, on every rank alike; rank 0 gets a conductor besides."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch.distributed as dist
from rich import get_console

from megatron_prefix.conductor import Conductor, Staff
from megatron_prefix.config import Recipe
from megatron_prefix.data.stop_tokens import agreed_stop_ids
from megatron_prefix.data.tokenizers import load_tokenizer
from megatron_prefix.evaluation.beside import Evaluator
from megatron_prefix.evaluation.evaluate import EvalResult, evaluate, write_samples
from megatron_prefix.health.metrics_page import announced
from megatron_prefix.health.watchdog import Watchdog, patience
from megatron_prefix.mcore.checkpoint import Checkpointer
from megatron_prefix.mcore.groups import (
    initialize_megatron,
    world_of,
)
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.offload import Offload
from megatron_prefix.mcore.optimizer import make_trainable
from megatron_prefix.modes import evaluates_aside, needs_shared_servers, teachers_of
from megatron_prefix.orders import share_words
from megatron_prefix.prefix import Ledger, build_policy, model_shape
from megatron_prefix.prefix.recall import Recall
from megatron_prefix.probes import Prober
from megatron_prefix.publisher import (
    NoPublisher,
    Publisher,
    ServerPublisher,
)
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.collector import Collector
from megatron_prefix.rollout.discarded import Discarded
from megatron_prefix.rollout.fleet import Fleet
from megatron_prefix.rollout.pool import Everyone, Roster
from megatron_prefix.run_files.jsonl import EVALUATION_FOLDER
from megatron_prefix.run_files.log import RunLog
from megatron_prefix.student import Objective
from megatron_prefix.supplies import build_source, prompt_stream
from megatron_prefix.teacher import ColocatedTeacher, Teacher, in_host_memory
from megatron_prefix.teachers.lagged import LaggedTeacher
from megatron_prefix.teachers.loop import TeacherLoop
from megatron_prefix.teachers.served import model_config
from megatron_prefix.trainer import Parts, Trainer
from megatron_prefix.types import Prompt, Rollout
from megatron_prefix.world import (
    build_objective,
    build_teacher,
    collective_timeout,
    join,
    load_model,
    teacher_loop,
    this_device,
    token_multiple,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Servers:
    """Some of the run's servers; ``endpoints`` and ``fleet`` are rank 0's."""

    wanted: bool  # alike on every rank
    endpoints: Sequence[Endpoint]
    fleet: Fleet | None


@contextlib.contextmanager
def assemble(
    recipe: Recipe,
    folder: Path,
    endpoints: Sequence[Endpoint],
    stop_requested: Callable[[], bool],
    teacher_servers: Mapping[str, Sequence[Endpoint]] = MappingProxyType({}),
) -> Iterator[Trainer | TeacherLoop]:
    """What this rank runs: a trainer, or the loop of a teacher that has ranks of its own.

    Collective; ``endpoints`` are rank 0's, ``teacher_servers`` every rank's, by domain.
    """
    with contextlib.ExitStack() as stack:
        initialize_megatron(recipe.train.seed, collective_timeout(recipe))
        world = join(recipe)
        patience_s = patience(recipe.run.distributed_timeout_s)
        watchdog = stack.enter_context(Watchdog(folder, dist.get_rank(), patience_s))
        if world.student is None:
            yield teacher_loop(recipe, world, watchdog)
            return

        def ask_rank_0(act: Callable[[], str]) -> str:
            with watchdog.waits_for_rank_0():
                return share_words(act, world.host_group)

        stack.enter_context(world_of(world.student))
        student = load_model(recipe.student, "student", world.student, recipe.checkpoint.load)
        trainable = make_trainable(student, recipe.optimizer, recipe.train.steps)
        shared, own = _servers(recipe, endpoints, watchdog, stack)
        teacher = build_teacher(recipe, world, student, teacher_servers, stack)
        objective = build_objective(recipe, student, world.device)
        ask_rank_0(lambda: _meet(shared, own))
        yield Trainer(
            recipe,
            Parts(
                student=trainable,
                teacher=teacher,
                objective=objective,
                lagged=_lagged(recipe, student, teacher, objective, folder, watchdog),
                publisher=_publisher(recipe, student, shared, folder / "sync", stack),
                evaluation_publisher=_publisher(
                    recipe, student, own, folder / "sync_evaluation", stack
                ),
                checkpointer=Checkpointer(
                    folder / "checkpoints",
                    trainable,
                    recipe.checkpoint,
                    ask_rank_0,
                    watchdog.goes_on,
                ),
                conductor=_conductor(recipe, folder, shared, own, stop_requested, stack),
                host_group=world.host_group,
                device=world.device,
                export_folder=folder / "hf",
                token_multiple=token_multiple(recipe),
                watchdog=watchdog,
                offload=Offload(in_host_memory(teacher)),
            ),
        )


def _lagged(
    recipe: Recipe,
    student: MegatronModel,
    teacher: Teacher | None,
    objective: Objective,
    folder: Path,
    watchdog: Watchdog,
) -> LaggedTeacher | None:
    every = recipe.mode.refresh_teacher_every
    if not every:
        return None
    assert isinstance(teacher, ColocatedTeacher), "validate refuses others"
    return LaggedTeacher(student, teacher, objective.teacher_head, folder, every, watchdog.goes_on)


def _publisher(
    recipe: Recipe,
    student: MegatronModel,
    servers: _Servers,
    folder: Path,
    stack: contextlib.ExitStack,
) -> Publisher:
    if not servers.wanted:
        return NoPublisher()
    publisher = ServerPublisher(student, recipe.rollout, servers.fleet, this_device(), folder)
    stack.callback(publisher.close)
    return publisher


def _meet(*servers: _Servers) -> str:
    """Wait until they answer; nothing to tell."""
    for each in servers:
        if each.fleet is not None:
            logger.info("waiting for %d SGLang server(s)", len(each.fleet.members))
            each.fleet.meet()
    return ""


def _servers(
    recipe: Recipe, endpoints: Sequence[Endpoint], watchdog: Watchdog, stack: contextlib.ExitStack
) -> tuple[_Servers, _Servers]:
    """Those that get the weights of every step, and those that evaluations have for themselves."""
    aside = evaluates_aside(recipe)
    shared = len(endpoints) - aside * recipe.eval.own_servers
    return (
        _with_fleet(recipe, needs_shared_servers(recipe), endpoints[:shared], watchdog, stack),
        _with_fleet(recipe, aside, endpoints[shared:], watchdog, stack),
    )


def _with_fleet(
    recipe: Recipe,
    wanted: bool,
    endpoints: Sequence[Endpoint],
    watchdog: Watchdog,
    stack: contextlib.ExitStack,
) -> _Servers:
    if not wanted or not endpoints:
        return _Servers(wanted, (), None)
    fleet = Fleet(endpoints, recipe.rollout, waiting=watchdog.goes_on)
    stack.callback(fleet.close)
    return _Servers(wanted, endpoints, fleet)


def _conductor(
    recipe: Recipe,
    folder: Path,
    shared: _Servers,
    own: _Servers,
    stop_requested: Callable[[], bool],
    stack: contextlib.ExitStack,
) -> Conductor | None:
    if dist.get_rank() != 0:
        return None
    if recipe.log.metrics_port:
        urls = [endpoint.url for endpoint in (*shared.endpoints, *own.endpoints)]
        stack.enter_context(announced(folder, recipe.log, urls))
    tokenizer = load_tokenizer(recipe.student.hf_path)
    stops = agreed_stop_ids(recipe)
    teachers = teachers_of(recipe)
    student, teacher, *others = (
        model_shape(model_config(m)) for m in (recipe.student, *teachers.values())
    )
    recall = Recall(recipe.prefix.recall) if recipe.prefix.recall.threshold else None
    shapes = dict(zip(teachers, (teacher, *others), strict=True))
    more_teachers = {domain: shape for domain, shape in shapes.items() if domain}
    endpoints, fleet, discarded = shared.endpoints, shared.fleet, Discarded()
    conductor = Conductor(
        recipe,
        Staff(
            policy=build_policy(recipe.prefix, recipe.train.steps),
            source=build_source(
                recipe, folder, endpoints, stops, tokenizer, recall, stack, fleet, discarded
            ),
            recall=recall,
            discarded=discarded,
            vocabularies={domain: shape.vocab for domain, shape in shapes.items()},
            ledger=Ledger(student, teacher, recipe.prefix.max_length, more_teachers),
            open_log=lambda step: RunLog(
                folder, recipe.log, recipe.train.steps, console=get_console(), resume_step=step
            ),
            decode=tokenizer.decode,
            evaluate=_evaluator(recipe, folder, own if own.wanted else shared, stops, tokenizer),
            probe=_prober(recipe, endpoints, fleet, stops, tokenizer, stack),
            stop_requested=stop_requested,
            fleet=fleet,
            evaluation_fleet=own.fleet,
        ),
    )
    stack.callback(conductor.close)
    return conductor


def _evaluator(
    recipe: Recipe,
    folder: Path,
    servers: _Servers,
    stops: tuple[int, ...],
    tokenizer: "PreTrainedTokenizerBase",
) -> Evaluator | None:
    if not recipe.eval.path or not servers.endpoints:
        return None
    greedy = replace(recipe.rollout, temperature=0.0, samples_per_prompt=1, over_sample=1.0)
    everyone = servers.fleet or Everyone(servers.endpoints)

    def run(step: int, policy_version: int, roster: Roster | None) -> EvalResult:
        asked = roster or everyone

        def answers(prompts: Sequence[Prompt], max_new_tokens: int) -> list[Rollout]:
            # Of its own each time: its event loop belongs to the thread that asks.
            with Collector(servers.endpoints, greedy, stops, roster=asked) as collector:
                return collector.collect(
                    prompts, max_new_tokens=max_new_tokens, policy_version=policy_version
                )

        result = evaluate(recipe.eval, tokenizer, answers, recipe.data, asked.waiting)
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
        return collector.collect(prompts, max_new_tokens=length, policy_version=policy_version)

    return run
