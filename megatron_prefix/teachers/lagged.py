"""A teacher that is a copy of the student from some steps ago.

The copy goes through a Hugging Face folder in the run's own, as an export does: exact in the
weights' dtype, for any two layouts, and there again when the run resumes.
"""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_prefix.mcore.export import export_hf
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.weights import head_shard
from megatron_prefix.teacher import ColocatedTeacher
from megatron_prefix.types import TeacherHead

logger = logging.getLogger(__name__)


class LaggedTeacher:
    """Brings the student's weights into trunk and head of its teacher, every ``every`` steps.

    ``head`` is the last stage's. ``folder`` holds ``teacher/`` and the run's ``checkpoints/``.
    """

    def __init__(
        self,
        student: MegatronModel,
        teacher: ColocatedTeacher,
        head: TeacherHead | None,
        folder: Path,
        every: int,
        goes_on: Callable[[], object] = lambda: None,  # told on every rank while it writes
    ) -> None:
        self._student, self._teacher, self._head = student, teacher, head
        self._folder, self._every, self._goes_on = folder, every, goes_on

    def refresh(self, step: int) -> None:
        """After ``step`` steps, where one is due. Collective over the world."""
        if step % self._every:
            return
        dtype = self._student.config.params_dtype
        export_hf(self._student, self._at(step), dtype, on_bucket=self._goes_on)
        self._load(step)
        if dist.get_rank() == 0:
            self._prune(step)
        logger.info("the teacher is now the student after step %d", step)

    def restore(self, step: int) -> None:
        """The teacher that a run had after ``step`` steps. Collective over the world.

        ValueError where its folder is gone: another teacher would go on in another direction.
        """
        last = step // self._every * self._every
        if not last:
            return
        if not (self._at(last) / "config.json").is_file():
            raise ValueError(
                f"{self._at(last)} is missing: the teacher that the run had after step {step}; "
                "bring it back, or start a run of another name"
            )
        self._load(last)

    def _at(self, step: int) -> Path:
        return self._folder / "teacher" / f"step_{step:08d}"

    @torch.no_grad()
    def _load(self, step: int) -> None:
        self._teacher.reload(self._at(step))
        if self._head is not None:
            student, weight = self._student, self._head.weight
            source = replace(student.hf, path=self._at(step))
            place = student.vocab_rows, student.groups.tp_rank
            weight.copy_(head_shard(source, *place, self._head.vocab_size, weight.dtype))

    def _prune(self, step: int) -> None:
        """Keeps the last two, for a save that is under way, and what a checkpoint needs."""
        every = self._every
        saved = (_step_of(path) for path in self._folder.glob("checkpoints/step_*"))
        needed = {step, step - every, *(each // every * every for each in saved)}
        for path in self._folder.glob("teacher/step_*"):
            if _step_of(path) not in needed:
                shutil.rmtree(path)


def _step_of(folder: Path) -> int:
    """Of ``step_00000012``, and of one that is being written."""
    return int(folder.name.split("_")[1].split(".")[0])
