"""Megatron's distributed checkpoints of the student, asynchronous, verified, and loadable into
another layout.

A checkpoint is written to ``step_00000012.partial`` and renamed when it is whole: metadata, SHA-256
manifest and all. What is no tensor (prompt position, prefix policy, ledger, ...) lies beside it in
``run_state.json``, covered by the same manifest.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_prefix.config import CheckpointConfig
from megatron_prefix.mcore.optimizer import TrainableStudent
from megatron_prefix.mcore.optimizer_state import join_state, optimizer_step, split_state

logger = logging.getLogger(__name__)
RUN_STATE = "run_state.json"
PARTIAL = ".partial"


@dataclass(frozen=True)
class Restored:
    """What a run goes on from."""

    folder: Path
    step: int
    run_state: dict[str, Any]


class Checkpointer:
    """Saves and restores one run's student under ``folder``. Its calls are collective."""

    def __init__(self, folder: Path, student: TrainableStudent, config: CheckpointConfig) -> None:
        self._folder, self._student, self._config = folder, student, config
        self._queue = AsyncCallsQueue()

    def save(self, step: int, run_state: dict[str, Any], *, wait: bool = False) -> None:
        """Start a save of the state after ``step`` steps; with ``wait`` return when it is whole."""
        self.finalize(wait=True)  # never two saves in flight
        final = self._folder / f"step_{step:08d}"
        partial = final.with_suffix(PARTIAL)
        if dist.get_rank() == 0:
            _make_empty(partial)
        dist.barrier()
        state, _ = self._sharded_state(is_loading=False)
        request = dist_checkpointing.save(
            state,
            str(partial),
            async_sharded_save=True,
            async_strategy="mcore",
            verify_integrity=self._config.verify_integrity,
        )
        if dist.get_rank() == 0:  # before the manifest is made, which covers it
            (partial / RUN_STATE).write_text(json.dumps({"step": step, **run_state}, indent=1))
        request.finalize_fns.append(lambda: self._complete(partial, final))
        self._queue.schedule_async_request(request)
        if wait or not self._config.async_save:
            self.finalize(wait=True)

    def finalize(self, *, wait: bool = False) -> None:
        """Complete a save whose writers are done; cheap where none is in flight."""
        self._queue.maybe_finalize_async_calls(blocking=wait)

    def _complete(self, partial: Path, final: Path) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            self._retain()
            logger.info("checkpoint %s is whole", final.name)
        dist.barrier()

    def _retain(self) -> None:
        """Drop the oldest beyond keep_last; the one just completed is the newest and stays."""
        whole = saved_steps(self._folder)
        if self._config.keep_last > 0:
            for folder in whole[: -self._config.keep_last]:
                shutil.rmtree(folder)

    def restore(self) -> Restored | None:
        """Load the newest checkpoint that verifies; None where there is none.

        One that fails its checksums is named in a warning and the one before it is tried.
        ValueError where checkpoints are there and none verifies.
        """
        folders = _agree([str(f) for f in reversed(saved_steps(self._folder))])
        for folder in folders:
            if self._verifies(folder):
                return self._load(Path(folder))
        if folders:
            raise ValueError(
                f"none of the {len(folders)} checkpoints in {self._folder} verifies; restore one "
                "from a backup or start with another run.name"
            )
        return None

    def _verifies(self, folder: str) -> bool:
        if not self._config.verify_integrity:
            return True
        try:
            verify_integrity_manifest(folder)
        except CheckpointingException as error:
            logger.warning("checkpoint %s is damaged and is not used: %s", folder, error)
            return False
        return True

    def _load(self, folder: Path) -> Restored:
        run_state = json.loads((folder / RUN_STATE).read_text())
        same_layout = run_state.get("layout") == self.layout_record()
        wanted, own = self._sharded_state(is_loading=True, with_rng=same_layout)
        state = dist_checkpointing.load(wanted, str(folder))
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

    def layout_record(self) -> list[int]:
        layout = self._student.model.groups.layout
        return [layout.tp, layout.dp, layout.pp]

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
            replica_id=groups.dp_rank,
        )


def saved_steps(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(f for f in folder.glob("step_*") if f.suffix != PARTIAL and f.is_dir())


def _load_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _agree(value: list[str]) -> list[str]:
    """Rank 0's view of a shared folder, so that no rank restores another checkpoint."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
