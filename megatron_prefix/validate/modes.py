"""What ``validate`` refuses of a recipe's mode: settings that no step of it would ever read, where
the run would silently be another than the one that was asked for."""

from dataclasses import fields
from pathlib import Path

from megatron_prefix.config import Recipe
from megatron_prefix.config.modes import WrittenConfig
from megatron_prefix.modes import is_supervised, needs_teacher, needs_written

_OF_A_FILE = ("name", "split", "prompt_column")  # of mode.written, where it has a path
_MOVED_BY_KL = ("adaptive", "marginal")


def check_modes(recipe: Recipe) -> None:
    """ValueError for a mode that cannot be, and for a part of it that nothing comes of."""
    steps = recipe.train.steps
    if recipe.mode.warmup_steps > steps:
        raise ValueError(
            f"mode.warmup_steps={recipe.mode.warmup_steps} is above train.steps={steps}; for a "
            "supervised run take mode.name=sft"
        )
    if not needs_teacher(recipe) and not recipe.teacher.hf_path:
        raise ValueError(
            f"teacher.hf_path is not set; no step of mode.name={recipe.mode.name} asks a teacher, "
            "but the ledger says what one would have cost: the student's folder will do"
        )
    _check_written(recipe)
    _check_policy(recipe)
    _check_refresh(recipe)


def _check_written(recipe: Recipe) -> None:
    written, plain = recipe.mode.written, WrittenConfig()
    changed = {
        each.name: getattr(written, each.name)
        for each in fields(written)
        if getattr(written, each.name) != getattr(plain, each.name)
    }
    for key, value in changed.items():
        if not needs_written(recipe):
            raise ValueError(
                f"mode.written.{key}={value} is read by no step of mode.name={recipe.mode.name}; "
                "take off_policy, mixed or sft, or set mode.warmup_steps"
            )
        if key in _OF_A_FILE and not written.path:
            raise ValueError(
                f"mode.written.{key}={value} is about a data set of its own, and mode.written.path "
                f"is empty; set that, or data.{key} for the rows of data.path"
            )


def _check_policy(recipe: Recipe) -> None:
    policy = recipe.prefix.policy
    if policy in _MOVED_BY_KL and is_supervised(recipe, recipe.train.steps - 1):
        raise ValueError(
            f"prefix.policy={policy} moves with the KL to a teacher, and no step of "
            f"mode.name={recipe.mode.name} has one; take fixed or a schedule, like linear"
        )


def _check_refresh(recipe: Recipe) -> None:
    """A copy of the student needs a teacher of the same shape, beside it, in the same dtype."""
    every, student, teacher = recipe.mode.refresh_teacher_every, recipe.student, recipe.teacher
    if not every:
        return
    named = f"mode.refresh_teacher_every={every}"
    if not needs_teacher(recipe):
        raise ValueError(f"{named}, but no step of mode.name={recipe.mode.name} asks a teacher")
    if Path(student.hf_path).resolve() != Path(teacher.hf_path).resolve():
        raise ValueError(
            f"{named} copies the student into the teacher, which must begin as the same: set "
            f"teacher.hf_path={student.hf_path}, not {teacher.hf_path}"
        )
    for key in ("params_dtype", "placement"):
        ours, theirs = getattr(student, key), getattr(teacher, key)
        if ours != theirs:
            raise ValueError(f"{named} needs teacher.{key}={ours}, the student's, not {theirs}")
    if recipe.teachers:
        raise ValueError(f"{named} copies into the one teacher; leave teachers out")
    if recipe.stop_tokens.teacher_ids:
        raise ValueError(f"{named}: the teacher is the student; leave stop_tokens.teacher_ids out")
