"""A run folder's record of its resolved recipe, and which settings make a run that run."""

import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from megatron_prefix.config import Recipe, TeacherServerConfig
from megatron_prefix.recipe.settings import finish, lay, leaves, read_yaml
from megatron_prefix.run_files.whole_file import whole_file

RECORD_NAME = "recipe.yaml"
_PLACES = (
    "tensor_model_parallel_size pipeline_model_parallel_size num_layers_in_first_pipeline_stage "
    "expert_model_parallel_size expert_tensor_parallel_size context_parallel_size "
    "sequence_parallel recompute_granularity placement offload world_size"
).split()
_PLACES += [f"server.{each.name}" for each in fields(TeacherServerConfig) if each.name != "top_k"]
# What a resumed run may change: where it runs, how it is laid out, how long it trains, what it
# reports. Whatever is not listed identifies the run. The schedules of the prefix length and of the
# learning rate stretch with train.steps.
OUTSIDE_IDENTITY = frozenset(
    ("run", "checkpoint", "eval", "log")
    + ("train.steps", "train.micro_batch_size", "train.max_skipped_steps")
    + tuple(f"{model}.{key}" for model in ("student", "teacher") for key in _PLACES)
    + tuple(
        f"rollout.{key}"
        for key in (
            "server_urls",
            *("api_key_file", "api_key"),
            "num_servers",
            "device",
            "server_tensor_parallel_size",
            "max_total_tokens",
            "server_args",
            *("start_timeout_s", "request_timeout_s", "retries"),
            *("hang_timeout_s", "server_restarts", "sync_timeout_s"),
            *("weight_sync", "bucket_mib", "verify_weights_every"),
            "logprob_tolerance",
            "record",
        )
    )
    + ("loss.chunk_size", "optimizer.overlap_grad_reduce")
)


def save_record(recipe: Recipe, folder: Path) -> Path:
    """Writes the resolved recipe into ``folder``, whole or not at all; ``load_record`` gives an
    equal one back. ValueError where the folder cannot be made or written to."""
    path = folder / RECORD_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write_text(yaml.safe_dump(asdict(recipe), sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error.strerror) from error
    return path


def load_record(path: Path) -> Recipe:
    """The recipe that ``save_record`` wrote; ValueError where it is none."""
    settings = leaves(read_yaml(path, yaml.SafeLoader))
    return finish(lay(OmegaConf.structured(Recipe()), settings, str(path)))


def identity(recipe: Recipe) -> dict[str, Any]:
    """The settings that make a run this run, by dotted key: all but ``OUTSIDE_IDENTITY``."""
    return {key: value for key, value in leaves(asdict(recipe)) if _identifies(key, value)}


def _identifies(key: str, value: Any) -> bool:
    if key.endswith(".placement") and value == "server":  # top-k targets are others
        return True
    owner, _, place = key.partition(".")
    if owner == "teachers" and place.partition(".")[2] in _PLACES:
        return False
    return key not in OUTSIDE_IDENTITY and owner not in OUTSIDE_IDENTITY


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 of :func:`identity`, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity(recipe), sort_keys=True).encode()).hexdigest()


def check_run_folder(folder: Path, recipe: Recipe) -> None:
    """ValueError where ``folder`` holds the run of another recipe, naming the first difference, or
    cannot be made or written to."""
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir():
        raise _unwritable(folder, f"{nearest} is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"{nearest} is not yours to write in")
    record = folder / RECORD_NAME
    if not record.exists():
        return
    theirs, ours = identity(load_record(record)), identity(recipe)
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        there, here = theirs.get(key, "nothing"), ours.get(key, "nothing")
        if there != here:
            raise ValueError(
                f"run folder {folder} holds another recipe's run: {key} is {there!r} there and "
                f"{here!r} here; give this run another run.name, or set {key} back"
            )


def _unwritable(folder: Path, why: str | None) -> ValueError:
    return ValueError(
        f"run folder {folder} cannot be written: {why}; set another run.name or run.output_dir"
    )
