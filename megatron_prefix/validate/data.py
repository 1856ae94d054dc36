"""What ``validate`` refuses of a recipe's data sets and evaluations. Nothing is fetched; of a file
on this machine the first row is read, for its columns."""

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_prefix.config import Recipe
from megatron_prefix.data.data_source import require_columns
from megatron_prefix.data.written import written_data
from megatron_prefix.evaluation.scorers import load_scorer
from megatron_prefix.health.watchdog import longest_wait
from megatron_prefix.modes import evaluates_aside, needs_prompts, needs_written

_LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet")


def is_local(path: str) -> bool:
    """Whether a data set's path can only mean this machine, not the hub."""
    named = path.endswith(_LOCAL_SUFFIXES) or path.startswith(("/", ".", "~"))
    return bool(path) and (named or Path(path).exists())


def check_data(recipe: Recipe) -> None:
    """ValueError for a path that is missing or not set, and for a column that a file lacks."""
    _check_stop_wait(recipe)
    _check_paths_are_set(recipe)
    load_scorer(recipe.eval.scorer)
    paths = {
        "data.path": recipe.data.path,
        "mode.written.path": recipe.mode.written.path,
        "eval.path": recipe.eval.path,
    }
    for key, path in paths.items():
        if is_local(path) and not Path(path).expanduser().exists():
            raise ValueError(f"{key}={path} does not exist; give a file, a folder or a hub id")
    for section, path, columns in _wanted_columns(recipe):
        if found := columns_of(Path(path).expanduser()):
            require_columns(dict.fromkeys(found), columns, section, path)


def columns_of(path: Path) -> tuple[str, ...]:
    """Those of the first row of a file; none where a look at it does not tell, or it is broken,
    which opening it will."""
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet

        try:
            return tuple(pyarrow.parquet.read_schema(path).names)
        except (OSError, pyarrow.ArrowInvalid):
            return ()
    if path.suffix != ".jsonl" or not path.is_file():
        return ()
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), "")
    try:
        row = json.loads(first or "{}")
    except json.JSONDecodeError:
        return ()
    return tuple(row) if isinstance(row, dict) else ()


def _wanted_columns(recipe: Recipe) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Section, path and columns by their setting, of each data set that is read."""
    data, written, evaluation = recipe.data, recipe.mode.written, recipe.eval
    if needs_prompts(recipe):
        yield "data", data.path, {"prompt_column": data.prompt_column}
        if recipe.teachers:
            yield "data", data.path, {"domain_column": data.domain_column}
    if _reads_written(recipe):
        theirs = written_data(recipe)
        section = "mode.written" if written.path else "data"
        yield section, theirs.path, {"prompt_column": theirs.prompt_column}
        yield "mode.written", theirs.path, {"answer_column": written.answer_column}
    if evaluation.path:
        for key in ("prompt_column", "answer_column"):
            yield "eval", evaluation.path, {key: getattr(evaluation, key)}


def _reads_written(recipe: Recipe) -> bool:
    return needs_written(recipe) and not recipe.rollout.replay


def _check_paths_are_set(recipe: Recipe) -> None:
    if recipe.data.path:
        return
    if needs_prompts(recipe):
        raise ValueError("data.path is not set; give a .jsonl or .parquet file, or a hub id")
    if _reads_written(recipe) and not recipe.mode.written.path:
        warmup = recipe.mode.warmup_steps
        who = f"mode.warmup_steps={warmup}" if warmup else f"mode.name={recipe.mode.name}"
        raise ValueError(
            f"{who} trains on written answers, and neither mode.written.path nor data.path is set; "
            "give a .jsonl or .parquet file, or a hub id, of prompts and answers"
        )


def _check_stop_wait(recipe: Recipe) -> None:
    """The other ranks are in a collective while rank 0 waits for answers."""
    wait_s, timeout_s = recipe.eval.stop_wait_s, recipe.run.distributed_timeout_s
    limit = longest_wait(timeout_s)
    if evaluates_aside(recipe) and wait_s > limit:
        raise ValueError(
            f"eval.stop_wait_s={wait_s:g} must be at most {limit:g}: no rank waits longer with "
            f"run.distributed_timeout_s={timeout_s:g}; set it to {limit:g}"
        )
