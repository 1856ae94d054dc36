"""A Hugging Face folder that is looked through before anything is made of it."""

from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path

from safetensors import safe_open

from megatron_prefix.hf_folder import REDUNDANT, HfFolder, check_sizes, read_hf_folder
from megatron_prefix.mcore.hf_map import FAMILIES, HfModel, read_hf_model


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
    try:
        return read_hf_model(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path} has no config.json; give a Hugging Face model folder") from error
    except KeyError as error:
        raise ValueError(f"{path}: config.json has no {error}") from error


def parameters(hf: HfModel) -> int:
    """Of the whole model, tied weights once."""
    return sum(prod(shape) for unit in hf.units for shape in unit.hf_shapes)


def params_dtype(folder: HfFolder) -> str:
    """fp32 where any tensor is, else bf16 (fp16 has no place in Megatron's bf16 training)."""
    kinds = {entry.dtype for entry in folder.tensors.values()}
    if "F16" in kinds:
        raise ValueError(f"{folder.path} is in fp16; choose --dtype fp32 or bf16")
    return "fp32" if "F32" in kinds else "bf16"


def tensor_problems(folder: HfFolder, hf: HfModel) -> list[str]:
    """Every tensor that is missing, of another shape or unknown, with what is wrong."""
    expected = expected_shapes(hf)
    found = [f"{name} is missing" for name in expected if name not in folder.tensors]
    for name, entry in folder.tensors.items():
        if name in expected and entry.shape != expected[name]:
            found.append(f"{name} has shape {list(entry.shape)}, not {list(expected[name])}")
        tied_head = name == "lm_head.weight" and hf.shape.tied
        known = name in expected or name.startswith(hf.skipped) or name.endswith(REDUNDANT)
        if not known and not tied_head:
            found.append(f"{name} has no place in a {folder.config['architectures'][0]}")
    return found


def expected_shapes(hf: HfModel) -> dict[str, tuple[int, ...]]:
    """Every Hugging Face tensor of the model by name."""
    return {
        name: tuple(shape)
        for unit in hf.units
        for name, shape in zip(unit.hf_names, unit.hf_shapes, strict=True)
    }


def check_values(folder: HfFolder, on_bytes: Callable[[int], object]) -> None:
    """Read every tensor, one in memory at a time; ValueError names all that are not finite.
    ``on_bytes`` is told of each tensor's size."""
    bad = []
    for file in sorted({entry.file for entry in folder.tensors.values()}):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  a safe_open is no dictionary
                tensor = opened.get_tensor(name)
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    bad.append(f"{name} holds values that are not finite")
                on_bytes(tensor.nbytes)
    _refuse(folder.path, bad)


def _refuse(path: Path, problems: Iterable[str]) -> None:
    if named := list(problems):
        raise ValueError(
            f"{path}: {len(named)} tensors are not as they must be: {'; '.join(named)}"
        )
