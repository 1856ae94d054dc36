"""A Hugging Face folder that is looked through before anything is made of it."""

from math import prod
from pathlib import Path

from megatron_prefix.hf_folder import (
    SCALE,
    HfFolder,
    check_sizes,
    not_as_they_must_be,
    read_hf_folder,
    tensor_problems,
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
    if problems := tensor_problems(folder, hf_tensors(hf.units), hf.skipped):
        raise ValueError(f"{path}: {not_as_they_must_be(problems)}")
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
