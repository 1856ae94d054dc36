"""The safetensors files of a model folder: which of them count, and where each tensor lies.

Sizes come from the headers (8 bytes of length, JSON, data), so that a missing shard, a truncated
download or a tensor of another shape is found before any server or rank starts.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a folder, by its file's header."""

    dtype: str  # safetensors' name, like BF16; MXFP4 for a weight of two tensors
    shape: tuple[int, ...]
    file: Path
    start: int  # of its bytes in the file


def tensor_table(path: Path, where: str) -> dict[str, TensorEntry]:
    """Every tensor of a folder by name, out of the file that the index says; ``where`` is for
    messages.

    ValueError for a folder without weights, an index that speaks of what is not there, and a tensor
    in two files between which no index decides.
    """
    files, index = weight_files(path, where), _weight_map(path, where)
    if not files:
        _refuse_no_weights(path, where)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if path / index.get(name, file.name) != file:
                continue
            if name in tensors:
                raise ValueError(
                    f"{where}: tensor {name} is in {tensors[name].file.name} and in {file.name}, "
                    f"and no {INDEX} says which counts; remove the file that does not"
                )
            tensors[name] = entry
    if lost := [f"{name} in {file}" for name, file in index.items() if name not in tensors]:
        raise ValueError(
            f"{where}: {INDEX} names tensors that are not there: {', '.join(lost)}; fetch the "
            "checkpoint again"
        )
    return tensors


def weight_files(path: Path, where: str) -> list[Path]:
    """The files that the index names, as transformers and SGLang take them; without one, all. A
    second copy of the weights may lie beside them (consolidated.safetensors)."""
    index = _weight_map(path, where)
    if not index:
        return sorted(path.glob("*.safetensors"))
    files = [path / name for name in sorted(set(index.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(
            f"{where}: {INDEX} names files that are missing: {', '.join(missing)}; fetch them again"
        )
    return files


def _weight_map(path: Path, where: str) -> Mapping[str, str]:
    """File by tensor; empty without an index."""
    if not (path / INDEX).exists():
        return {}
    found = read_json(path / INDEX, where).get("weight_map")
    if not (isinstance(found, dict) and found and all(isinstance(f, str) for f in found.values())):
        raise ValueError(f"{where}: {INDEX} has no weight_map of files by tensor; fetch it again")
    return found


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensor table of one safetensors file; ValueError where the file is not whole."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST_HEADER + 1
        if length > _LONGEST_HEADER:
            raise ValueError(f"{file} is no safetensors file ({size} bytes); fetch it again")
        text = opened.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {
            name: TensorEntry(
                entry["dtype"], tuple(entry["shape"]), file, 8 + length + entry["data_offsets"][0]
            )
            for name, entry in header.items()
        }
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} has a broken or truncated header; fetch it again") from error
    if size != 8 + length + end:
        raise ValueError(
            f"{file} has {size} bytes and its header speaks of {8 + length + end}: truncated or "
            "damaged; fetch it again"
        )
    return entries


def read_json(file: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{where} has no {file.name}; give a Hugging Face model folder") from error
    except ValueError as error:
        raise ValueError(f"{where}: {file.name} is no JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: {file.name} must hold an object; fetch it again")
    return content


def _refuse_no_weights(path: Path, where: str) -> None:
    if pickled := sorted(path.glob("*.bin")) + sorted(path.glob("*.pt*")):
        raise ValueError(
            f"{where} holds only pickled weights ({pickled[0].name}), which can run code when they "
            "are read; convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)"
        )
    raise ValueError(f"{where} has no weights (*.safetensors); fetch the whole checkpoint")
