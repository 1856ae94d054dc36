"""A Hugging Face folder that is looked through before anything is made of it."""

from collections.abc import Iterable
from math import prod
from pathlib import Path

from megatron_prefix.hf_folder import (
    REDUNDANT,
    SCALE,
    HfFolder,
    check_sizes,
    is_scale,
    read_hf_folder,
)
from megatron_prefix.mcore.hf_map import FAMILIES, HfModel, hf_model, read_hf_model
from megatron_prefix.mcore.hf_map.units import hf_tensors
from megatron_prefix.safetensors_files import read_json


def open_source(path: Path) -> tuple[HfFolder, HfModel]:
    """Folder and model, from headers and config.json alone.

    ValueError in one line for a folder that is no whole checkpoint of a supported family; tensors
    that are missing, unknown or of another shape are all named.
    """
    try:
        folder = read_hf_folder(str(path), "model")
        if folder.config["architectures"][0] in FAMILIES:
            check_sizes(folder, "model")
        hf = read_hf_model(str(path))
    except KeyError as error:
        raise ValueError(f"{path}: config.json has no {error}") from error
    except ValueError as error:  # speaks of a recipe's setting, which a tool has none of
        raise ValueError(str(error).replace("model.hf_path=", "")) from error
    _refuse(path, tensor_problems(folder, hf))
    hf.report_skipped(folder.tensors)
    return folder, hf


def open_config(path: Path) -> HfModel:
    """A folder's model by its config.json alone: its weights may be elsewhere. ValueError in one
    line for a folder without one, or of another family."""
    config = read_json(path / "config.json", str(path))
    try:
        return hf_model(str(path), config)
    except KeyError as error:
        raise ValueError(f"{path}: config.json has no {error}") from error


def parameters(hf: HfModel) -> int:
    """Of the whole model, tied weights once."""
    return sum(prod(shape) for unit in hf.units for shape in unit.hf_shapes)


def params_dtype(folder: HfFolder, hf: HfModel) -> str:
    """fp32 where any parameter is, else bf16 (fp16 has no place in Megatron's bf16 training)."""
    always = {name for unit in hf.units if unit.fp32_buffer for name in unit.hf_names}
    kinds = {
        entry.dtype
        for name, entry in folder.tensors.items()
        if name not in always and not name.endswith(SCALE)
    }
    if "F16" in kinds:
        raise ValueError(f"{folder.path} is in fp16; choose --dtype fp32 or bf16")
    return "fp32" if "F32" in kinds else "bf16"


def tensor_problems(folder: HfFolder, hf: HfModel) -> list[str]:
    """Every tensor that is missing, of another shape or unknown, with what is wrong."""
    expected = hf_tensors(hf.units)
    found = [f"{name} is missing" for name in expected if name not in folder.tensors]
    for name, entry in folder.tensors.items():
        if name in expected and entry.shape != expected[name]:
            found.append(f"{name} has shape {list(entry.shape)}, not {list(expected[name])}")
        tied_head = name == "lm_head.weight" and hf.shape.tied
        known = name in expected or name.startswith(hf.skipped) or name.endswith(REDUNDANT)
        if not known and not tied_head and not is_scale(folder.tensors, name):
            found.append(f"{name} has no place in a {folder.config['architectures'][0]}")
    return found


def _refuse(path: Path, problems: Iterable[str]) -> None:
    if named := list(problems):
        raise ValueError(
            f"{path}: {len(named)} tensors are not as they must be: {'; '.join(named)}"
        )
