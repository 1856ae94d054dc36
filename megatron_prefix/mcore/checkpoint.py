"""Megatron's distributed checkpoints of the student, asynchronous, verified, and loadable into
another layout.

A checkpoint is written to ``step_00000012.partial`` and renamed when it is whole: metadata,
manifest of sums and all. What is no tensor (prompt position, prefix policy, ledger, ...) lies
beside it in ``run_state.json``, covered by the same manifest.
"""

import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prefix.config import CheckpointConfig
from megatron_prefix.layout import saved_layout
from megatron_prefix.mcore.fp8 import allowing_pickled_scales
from megatron_prefix.mcore.manifest import RUN_STATE, damage
from megatron_prefix.mcore.optimizer import TrainableStudent
from megatron_prefix.mcore.optimizer_state import join_state, optimizer_step, split_state
from megatron_prefix.mcore.sealing import Sealing, Tell
from megatron_prefix.mcore.step_folders import (
    PARTIAL,
    clear_unfinished,
    saved_steps,
    set_aside,
    step_folder,
)
from megatron_prefix.mcore.writers import await_writers, ended_with_rank
from megatron_prefix.mcore.writers_queue import make_writers_queue

logger = logging.getLogger(__name__)
_ROOM, _ROOM_BYTES = "room", 16 * 2**20  # for metadata and manifest, beside the tensors
# Has rank 0 find out something, and tells every rank its words. Collective.
AskRank0 = Callable[[Callable[[], str]], str]


class SaveFailed(RuntimeError):
    """A checkpoint that had to be whole is not; those before it are as they were."""


@dataclass(frozen=True)
class _Written:
    """A checkpoint whose files are all there."""

    partial: Path
    final: Path
    sealing: Sealing | None  # on rank 0


@dataclass(frozen=True)
class Restored:
    """What a run goes on from."""

    folder: Path
    step: int
    run_state: dict[str, Any]


def _broadcast(act: Callable[[], str]) -> str:
    box = [act() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Checkpointer:
    """Saves and restores one run's student under ``folder``. Its calls are collective.

    ``ask_rank_0`` is for what takes as long as reading a checkpoint does, and ``goes_on`` is told
    wherever one is waited for, as long as bytes are written or read.
    """

    def __init__(
        self,
        folder: Path,
        student: TrainableStudent,
        config: CheckpointConfig,
        ask_rank_0: AskRank0 = _broadcast,
        goes_on: Tell = lambda: None,
    ) -> None:
        self._folder, self._student, self._config = folder, student, config
        self._ask_rank_0, self._goes_on = ask_rank_0, goes_on
        self._queue = AsyncCallsQueue()
        self._writing = folder  # what was begun last
        self._written: _Written | None = None
        self._problem = ""

    def save(self, step: int, run_state: dict[str, Any], *, wait: bool = False) -> None:
        """Start a save of the state after ``step`` steps; with ``wait`` return when it is whole.

        Raises SaveFailed with ``wait`` only; :meth:`finalize` tells of the others.
        """
        self.finalize(wait=True)  # never two saves in flight
        earlier = self.take_problem()  # is not this one's
        final = step_folder(self._folder, step)
        partial = final.with_suffix(PARTIAL)
        problem = self._share(_make_room(partial) if dist.get_rank() == 0 else "")
        if problem:
            self._give_up(partial, final, problem)
        else:
            self._start(partial, final, json.dumps({"step": step, **run_state}, indent=1))
            if wait or not self._config.async_save:
                self.finalize(wait=True)
        if wait and self._problem:
            raise SaveFailed(self.take_problem())
        self._problem = self._problem or earlier

    def _start(self, partial: Path, final: Path, run_state: str) -> None:
        make_writers_queue()
        state, _ = self._sharded_state(is_loading=False)
        request = dist_checkpointing.save(
            state,
            str(partial),
            async_sharded_save=True,
            async_strategy="mcore",
            verify_integrity=False,  # it would read all of it within the loop: sealing.py does so
        )
        finish = functools.partial(self._finish, request.finalize_fns, partial, final, run_state)
        self._queue.schedule_async_request(ended_with_rank(request)._replace(finalize_fns=[finish]))
        self._writing = partial

    def finalize(self, *, wait: bool = False) -> None:
        """Complete a save whose writers are done; cheap where none is in flight."""
        if wait:
            await_writers(self._queue, self._writing, self._goes_on)
        self._queue.maybe_finalize_async_calls()
        written = self._written
        if written is None:
            return
        problem = self._sealed(written.sealing) if wait else _problem_so_far(written.sealing)
        if problem is not None:
            self._written = None
        if problem:
            self._give_up(written.partial, written.final, problem)

    def _sealed(self, sealing: Sealing | None) -> str:
        def end() -> str:
            assert sealing is not None, "rank 0's"
            return sealing.problem(self._goes_on)

        return self._ask_rank_0(end)

    def take_problem(self) -> str:
        """Why a save came to nothing since the last call; empty where none did."""
        problem, self._problem = self._problem, ""
        return problem

    def _finish(
        self, steps: Sequence[Callable[[], None]], partial: Path, final: Path, run_state: str
    ) -> None:
        """Megatron's own ``steps``; the sums and the final name come beside the next steps. On a
        full disk no checkpoint is whole: what was written is removed, the run goes on, and those
        before it stay."""
        problem = _write_last(partial, run_state) if dist.get_rank() == 0 else ""
        # Always, since it takes the writers' results: the next save's must be the next ones.
        problem = self._share(problem or _first_problem(steps[:1]))
        if not problem:
            problem = self._share(_first_problem(steps[1:]))
        if problem:
            self._give_up(partial, final, problem)
            return
        first = dist.get_rank() == 0
        sealing = Sealing(partial, final, self._config) if first else None
        self._written = _Written(partial, final, sealing)

    def _give_up(self, partial: Path, final: Path, problem: str) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        kept = saved_steps(self._folder)
        newest = f"the newest whole one is {kept[-1].name}" if kept else "there is none before"
        self._problem = f"checkpoint {final.name} could not be written: {problem}; {newest}"
        logger.error("%s", self._problem)

    def _share(self, problem: str) -> str:
        """The first problem of any rank, on all."""
        problems: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        return next(filter(None, problems), "")

    def restore(self) -> Restored | None:
        """Load the newest checkpoint that verifies; None where there is none.

        One that fails its checksums is named in a warning and set aside, and the one before it is
        tried; one that was being written when the run ended is named and removed. ValueError where
        checkpoints are there and none verifies.
        """
        if dist.get_rank() == 0:
            for name in clear_unfinished(self._folder):
                logger.warning("checkpoint %s was not whole when the run ended: not used", name)
        folders = _agree([str(f) for f in reversed(saved_steps(self._folder))])
        for place, folder in enumerate(folders):
            if self._verifies(Path(folder)):
                if dist.get_rank() == 0:  # the damaged ones, now that the run goes on without them
                    for damaged in folders[:place]:
                        set_aside(Path(damaged))
                return self._load(Path(folder))
        if folders:
            raise ValueError(
                f"none of the {len(folders)} checkpoints in {self._folder} verifies; restore one "
                "from a backup or start with another run.name"
            )
        return None

    def _verifies(self, folder: Path) -> bool:
        if not self._config.verify_integrity:
            return True
        problem = self._ask_rank_0(lambda: damage(folder, lambda size: self._goes_on()))
        if problem:
            logger.warning("checkpoint %s is damaged and is not used: %s", folder, problem)
        return not problem

    def _load(self, folder: Path) -> Restored:
        run_state = json.loads((folder / RUN_STATE).read_text())
        layout = self._student.model.groups.layout
        same_layout = layout.was_saved(saved_layout(run_state))
        wanted, own = self._sharded_state(is_loading=True, with_rng=same_layout)
        state = dist_checkpointing.load(wanted, str(folder))
        with allowing_pickled_scales(self._student.model.config):
            self._student.model.module.load_state_dict(state["model"])
        self._student.optimizer.load_state_dict(
            join_state(state["optimizer"], own, state["optimizer_step"])
        )
        self._student.scheduler.num_steps = 0  # Megatron adds the saved steps to those it has
        self._student.scheduler.load_state_dict(state["scheduler"])
        if same_layout:
            _load_rng(state["rng"])
        else:
            logger.info("the checkpoint has another layout: random states start anew")
        return Restored(folder, run_state["step"], run_state)

    def layout_record(self) -> dict[str, int]:
        return self._student.model.groups.layout.record

    def _sharded_state(
        self, *, is_loading: bool, with_rng: bool = True
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is in a checkpoint, and of the optimizer what is not."""
        model = self._student.model
        metadata = {
            # The one format of the distributed optimizer that loads into another tp and pp.
            "distrib_optim_sharding_type": "fully_reshardable",
            "dp_cp_group": model.groups.pg.dp_cp,
            "chained_optim_avoid_prefix": True,
        }
        weights = model.module.sharded_state_dict(metadata=metadata)
        sharded, own = split_state(
            self._student.optimizer.sharded_state_dict(
                weights, is_loading=is_loading, metadata=metadata
            )
        )
        state = {
            "model": weights,
            "optimizer": sharded,
            "optimizer_step": optimizer_step(own),
            "scheduler": self._student.scheduler.state_dict(),
        }
        if with_rng:
            state["rng"] = self._rng_object()
        return state, own

    def _rng_object(self) -> ShardedObject:
        groups = self._student.model.groups
        return ShardedObject(
            "rng",
            {"torch": torch.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()},
            (groups.layout.pp, groups.layout.tp),
            (groups.pp_rank, groups.tp_rank),
            replica_id=groups.replica_rank,
        )


def _problem_so_far(sealing: Sealing | None) -> str | None:
    """Rank 0's on every rank; None while it is at work."""
    verdict: list[Any] = [None]
    if sealing and sealing.done():
        verdict = [sealing.problem()]
    dist.broadcast_object_list(verdict, src=0)
    problem: str | None = verdict[0]
    return problem


def _load_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _make_room(folder: Path) -> str:
    """An empty folder with a file in it that keeps room for what rank 0 writes last by itself,
    where it could not tell the others that the disk is full."""
    try:
        _make_empty(folder)
        with (folder / _ROOM).open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, _room_bytes(folder))
    except OSError as error:
        return str(error)
    return ""


def _room_bytes(folder: Path) -> int:
    return min(_ROOM_BYTES, shutil.disk_usage(folder).total // 64)


def _write_last(folder: Path, run_state: str) -> str:
    """Write what is no tensor, in the room that was kept; why that cannot be."""
    try:
        (folder / _ROOM).unlink()
        (folder / RUN_STATE).write_text(run_state)
    except OSError as error:
        return str(error)
    return ""


def _first_problem(steps: Sequence[Callable[[], None]]) -> str:
    """Of Megatron's; a writer's failure is raised on all ranks, with its words on one."""
    try:
        for step in steps:
            step()
    except (CheckpointException, OSError, RuntimeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _agree(value: list[str]) -> list[str]:
    """Rank 0's view of a shared folder, so that no rank restores another checkpoint."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
