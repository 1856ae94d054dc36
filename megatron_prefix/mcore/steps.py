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
from megatron_prefix.mcore.step_folders import saved_steps

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


def find_step(checkpoint: Path, step: int | None) -> Path:
    """The folder of one step: ``checkpoint`` itself, or of a run's checkpoints the newest or the
    one asked for."""
    if not checkpoint.is_dir():
        raise ValueError(f"--checkpoint {checkpoint} is no folder")
    if (checkpoint / "run_state.json").is_file():
        return checkpoint
    there = saved_steps(checkpoint)
    if not there:
        raise ValueError(f"--checkpoint {checkpoint} holds no step_* folder; give a run's one")
    if step is None:
        return there[-1]
    wanted = checkpoint / f"step_{step:08d}"
    if wanted not in there:
        names = ", ".join(str(int(f.name.removeprefix("step_"))) for f in there)
        raise ValueError(f"--step {step} is not in {checkpoint}; there: {names}")
    return wanted


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
    try:
        step = find_step(Path(folder), None)
    except ValueError as error:
        raise ValueError(str(error).replace("--checkpoint ", "checkpoint.load=")) from error
    refuse_other_model(hf, step, saved_weights(step))
    return step
