"""Has the modules of every stage built and counted, in a process of its own."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING

from megatron_prefix.plan.memory import Stage, stages
from megatron_prefix.plan.stages import stage_layers
from megatron_prefix.plan.teachers import teachers_that_score
from megatron_prefix.types import Held
from megatron_prefix.validate import ValidModel, ValidRun

if TYPE_CHECKING:
    from megatron_prefix.mcore.census import Question

Census = Callable[[Sequence["Question"]], list[Held]]


def count_held(run: ValidRun, census: Census | None = None) -> dict[Stage, Held]:
    """What the first rank of each stage holds, with the optimizer's shards of its neighbours.
    Stages that are built alike are built once.

    Takes seconds, most of them for importing Megatron-Core. ``census``: how the questions are
    answered; None starts a process.
    """
    kinds = {stage: _kind(run, stage) for stage in stages(run)}
    first = {kind: stage for stage, kind in reversed(kinds.items())}
    questions = [question(run, stage) for stage in first.values()]
    answers = (census or _in_a_process)(questions)
    held = dict(zip(first, answers, strict=True))
    return {stage: held[kind] for stage, kind in kinds.items()}


def _in_a_process(questions: Sequence["Question"]) -> list[Held]:
    from megatron_prefix.mcore.census import take_census

    # Not a fork: on a machine with GPUs, the child must not see them.
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_without_stderr) as pool:
        return pool.submit(take_census, questions).result()


def _without_stderr() -> None:
    """Megatron-Core warns of much at its import; errors come back as exceptions."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _model(run: ValidRun, stage: Stage) -> ValidModel:
    return run.student if stage.owner == "student" else teachers_that_score(run)[stage.domain]


def _kind(run: ValidRun, stage: Stage) -> tuple[object, ...]:
    """Equal for stages of the same modules."""
    model = _model(run, stage)
    layers = stage_layers(model.layers, stage.number)
    sparse = tuple(layer in model.hf.shape.sparse_layers for layer in layers)
    ends = stage.number == 0, stage.number == model.layout.pp - 1
    return stage.owner, stage.domain, ends, sparse


def question(run: ValidRun, stage: Stage, rank: int | None = None) -> "Question":
    """``rank``: one of the stage's; None: its first."""
    from megatron_prefix.mcore.census import Question

    model = _model(run, stage)
    return Question(
        config=model.config,
        hf_config=model.hf.config,
        layout=model.layout,
        world_size=run.world_size,
        rank=model.layout.rank(0, 0, stage.number) if rank is None else rank,
        optimizer=run.recipe.optimizer if stage.owner == "student" else None,
    )
