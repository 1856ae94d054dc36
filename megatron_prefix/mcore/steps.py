"""Steps of Megatron's distributed checkpoints on disk: which there are, and what they hold.

Read without Megatron, so that a run's settings can be checked before anything starts.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from megatron_prefix.mcore.dist_keys import VOCABULARY, place_of
from megatron_prefix.mcore.hf_map import HfModel
from megatron_prefix.mcore.manifest import RUN_STATE
from megatron_prefix.mcore.step_folders import saved_steps, step_of

CHECKPOINTS = "checkpoints"  # of a run's folder
NOT_WEIGHTS = ("optimizer.", "optimizer/", "rng", "scheduler")


@dataclass(frozen=True)
class SavedTensor:
    shape: tuple[int, ...]  # whole
    dtype: torch.dtype


def saved_tensors(step: Path) -> dict[str, SavedTensor]:
    """Every tensor of a step by key, the optimizer's too; ValueError for a table that is broken."""
    try:
        table = FileSystemReader(step).read_metadata()
    except (OSError, EOFError, pickle.UnpicklingError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{step} is no whole Megatron checkpoint: {words}") from error
    return {
        key: SavedTensor(tuple(tensor.size), tensor.properties.dtype)
        for key, tensor in table.state_dict_metadata.items()
        if isinstance(tensor, TensorStorageMetadata)
    }


def saved_weights(step: Path) -> dict[str, SavedTensor]:
    """The model's alone."""
    tensors = saved_tensors(step)
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(NOT_WEIGHTS)}


def checkpoints_of(folder: Path) -> Path:
    """Of a run's folder its checkpoints; any other as it is."""
    return folder / CHECKPOINTS if saved_steps(folder / CHECKPOINTS) else folder


def find_step(folder: Path, step: int | None, given_as: str = "--checkpoint ") -> Path:
    """The folder of one step: ``folder`` itself, or of a run, or of its checkpoints, the newest or
    the one asked for. ``given_as`` is for messages."""
    if not folder.is_dir():
        raise ValueError(f"{given_as}{folder} is no folder")
    if (folder / RUN_STATE).is_file():
        if step not in (None, _number(folder)):
            raise ValueError(f"--step {step} is not {folder}, which is one step; give the run's")
        return folder
    checkpoint = checkpoints_of(folder)
    there = saved_steps(checkpoint)
    if not there:
        raise ValueError(f"{given_as}{folder} holds no step_* folder; give a run's one")
    if step is None:
        return there[-1]
    wanted = checkpoint / f"step_{step:08d}"
    if wanted not in there:
        names = ", ".join(str(step_of(f)) for f in there)
        raise ValueError(f"--step {step} is not in {checkpoint}; there: {names}")
    return wanted


def _number(step: Path) -> int | None:
    """Of a step's folder; None where it has another name."""
    name = step.resolve().name.removeprefix("step_")
    return int(name) if name.isdecimal() else None


def refuse_other_model(hf: HfModel, step: Path, saved: Mapping[str, SavedTensor]) -> None:
    """ValueError that names all tensors which are missing, unknown or of another shape."""
    wrong = []
    expected = {place_of(unit, hf).key: unit for unit in hf.units}
    for key, unit in expected.items():
        wanted = place_of(unit, hf).whole
        there = saved[key].shape if key in saved else None
        if unit.megatron_name in VOCABULARY:  # padded for any number of ranks
            wanted = unit.shape if there is None else (max(there[0], unit.shape[0]), *wanted[1:])
        if there is None:
            wrong.append(f"{key} is missing")
        elif there != wanted:
            wrong.append(f"{key} has shape {list(there)}, not {list(wanted)}")
    wrong += [f"{key} has no place in it" for key in saved if key not in expected]
    if wrong:
        raise ValueError(f"{step} does not hold the model of {hf.path}: {'; '.join(sorted(wrong))}")


def check_saved_weights(hf: HfModel, folder: str) -> Path:
    """The step's folder in ``folder``, a run's or a converted one, or a step itself: the newest.

    ValueError where there is none, or where it does not hold ``hf``'s model.
    """
    step = find_step(Path(folder), None, "checkpoint.load=")
    refuse_other_model(hf, step, saved_weights(step))
    return step
