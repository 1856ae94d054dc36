"""Tensors of safetensors files, read and written one at a time.

Plain reads and writes, not mapped files: what a process holds is what it asked for.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_prefix.hf_folder import (
    MXFP4_BLOCKS,
    MXFP4_SCALES,
    SCALE,
)
from megatron_prefix.mcore.checked_files import Behind, CheckedFile, Scratch, read_into
from megatron_prefix.mcore.fp8_blocks import dequantize_blocks
from megatron_prefix.mcore.hf_map.units import Unit
from megatron_prefix.mcore.mxfp4 import dequantize_mxfp4
from megatron_prefix.safetensors_files import TensorEntry, tensor_table

TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


class HfReader:
    """Tensors of a safetensors folder by name, one at a time; those in FP8 and MXFP4 come
    dequantised, in fp32."""

    def __init__(self, path: Path) -> None:
        self._entries = tensor_table(path, str(path))

    def tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        stored = read_tensor(entry)
        if entry.dtype != "F8_E4M3":
            return stored
        return dequantize_blocks(stored, read_tensor(self._entries[name + SCALE]))

    def of_unit(self, unit: Unit, scratch: Scratch | None = None) -> list[Tensor]:
        """A unit's tensors as its name map shapes them: of a stack of experts, its own. Given
        ``scratch``, those of one dtype lie there, one right behind the other."""
        if unit.stacked:
            return [self.rows(name, unit.expert, unit.expert + 1)[0] for name in unit.hf_names]
        entries = [self._entries[name] for name in unit.hf_names]
        kinds = {entry.dtype for entry in entries}
        if scratch is None or len(kinds) > 1 or "F8_E4M3" in kinds:
            return [self.tensor(name) for name in unit.hf_names]
        sizes = [prod(entry.shape) * TORCH_DTYPES[entry.dtype].itemsize for entry in entries]
        parts = scratch.take(sum(sizes)).split(sizes)
        return [_fill(part, entry) for part, entry in zip(parts, entries, strict=True)]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """``start:stop`` along the first axis of a tensor, clipped to what it has."""
        if name not in self._entries:
            parts = (self._entries[name + tail] for tail in (MXFP4_BLOCKS, MXFP4_SCALES))
            return dequantize_mxfp4(*(read_tensor(part, start, stop) for part in parts))
        entry = self._entries[name]
        stop = min(stop, entry.shape[0])
        start = min(start, stop)
        if entry.dtype == "F8_E4M3":
            return self.tensor(name)[start:stop]
        return read_tensor(entry, start, stop)


def read_tensor(entry: TensorEntry, start: int = 0, stop: int | None = None) -> Tensor:
    """The tensor, or rows ``start:stop`` of it, in memory of its own."""
    shape, dtype = entry.shape, TORCH_DTYPES[entry.dtype]
    offset = entry.start
    if stop is not None:
        offset += start * prod(shape[1:]) * dtype.itemsize
        shape = (stop - start, *shape[1:])
    memory = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8)
    with entry.file.open("rb", buffering=0) as file:
        read_into(file, offset, memory)
    return memory.view(dtype).view(shape)


def _fill(memory: Tensor, entry: TensorEntry) -> Tensor:
    with entry.file.open("rb", buffering=0) as file:
        read_into(file, entry.start, memory)
    return memory.view(TORCH_DTYPES[entry.dtype]).view(entry.shape)


def write_tensors(
    file: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
    on_bytes: Callable[[int], object],
) -> None:
    """One safetensors file of ``shapes``' tensors, which ``tensors`` gives in that order.

    Each may change once the one after the next is asked for: one is written meanwhile. All are read
    back and compared; RuntimeError where the file holds another. ``on_bytes`` is told of each
    one's size.
    """
    header = _header(shapes)
    with CheckedFile(file) as opened, Behind() as behind:
        opened.write(header)
        for (name, (shape, dtype)), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (given, tuple(tensor.shape), tensor.dtype) == (name, shape, dtype), given
            data = tensor.contiguous().view(-1).view(torch.uint8)
            behind.submit(opened.write, memoryview(data.numpy()))
            on_bytes(data.numel())


def _header(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        entries[name] = entry
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data
    return struct.pack("<Q", len(text)) + text
