"""What ``validate`` refuses of a recipe's data sets, its mode and its evaluations; no data set is
opened."""

from pathlib import Path

from megatron_prefix.config import Recipe
from megatron_prefix.modes import evaluates_aside, needs_prompts, needs_teacher, needs_written
from megatron_prefix.scorers import load_scorer
from megatron_prefix.watchdog import longest_wait

_LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")


def is_local(path: str) -> bool:
    """Whether a data set's path can only mean this machine, not the hub."""
    named = path.endswith(_LOCAL_SUFFIXES) or path.startswith(("/", ".", "~"))
    return bool(path) and (named or Path(path).exists())


def check_data(recipe: Recipe) -> None:
    """ValueError for a path that is missing or not set, and for a mode that cannot be."""
    steps = recipe.train.steps
    if recipe.mode.warmup_steps > steps:
        raise ValueError(
            f"mode.warmup_steps={recipe.mode.warmup_steps} is above train.steps={steps}; for a "
            "supervised run take mode.name=sft"
        )
    _check_refresh(recipe)
    _check_stop_wait(recipe)
    written = recipe.mode.written.path
    if not recipe.data.path and (needs_prompts(recipe) or _lacks_written(recipe)):
        raise ValueError("data.path is not set; give a .jsonl or .parquet file, or a hub id")
    if written and not needs_written(recipe):
        raise ValueError(
            f"mode.written.path={written} is read by no step of mode.name={recipe.mode.name}; "
            "take off_policy, mixed or sft, or set mode.warmup_steps"
        )
    load_scorer(recipe.eval.scorer)
    paths = {
        "data.path": recipe.data.path,
        "mode.written.path": written,
        "eval.path": recipe.eval.path,
    }
    for key, path in paths.items():
        if is_local(path) and not Path(path).expanduser().exists():
            raise ValueError(f"{key}={path} does not exist; give a file, a folder or a hub id")


def _lacks_written(recipe: Recipe) -> bool:
    replayed = bool(recipe.rollout.replay)
    return needs_written(recipe) and not recipe.mode.written.path and not replayed


def _check_stop_wait(recipe: Recipe) -> None:
    """The other ranks are in a collective while rank 0 waits for answers."""
    wait_s, timeout_s = recipe.eval.stop_wait_s, recipe.run.distributed_timeout_s
    limit = longest_wait(timeout_s)
    if evaluates_aside(recipe) and wait_s > limit:
        raise ValueError(
            f"eval.stop_wait_s={wait_s:g} must be at most {limit:g}: no rank waits longer with "
            f"run.distributed_timeout_s={timeout_s:g}; set it to {limit:g}"
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
