"""Tensors of safetensors files, read and written one at a time.

Plain reads and writes, not mapped files: what a process holds is what it asked for.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from io import RawIOBase
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_prefix.hf_folder import (
    MXFP4_BLOCKS,
    MXFP4_SCALES,
    SCALE,
    TensorEntry,
    read_header,
)
from megatron_prefix.mcore.fp8_blocks import dequantize_blocks
from megatron_prefix.mcore.hf_map.units import Unit
from megatron_prefix.mcore.mxfp4 import dequantize_mxfp4

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
    dequantised, in fp32.

    The files themselves say where a tensor is: an index may be stale.
    """

    def __init__(self, path: Path) -> None:
        self._entries: dict[str, TensorEntry] = {}
        for file in sorted(path.glob("*.safetensors")):
            self._entries |= read_header(file)

    def tensor(self, name: str) -> Tensor:
        entry = self._entries[name]
        stored = read_tensor(entry)
        if entry.dtype != "F8_E4M3":
            return stored
        return dequantize_blocks(stored, read_tensor(self._entries[name + SCALE]))

    def of_unit(self, unit: Unit) -> list[Tensor]:
        """A unit's tensors as its name map shapes them: of a stack of experts, its own."""
        if not unit.stacked:
            return [self.tensor(name) for name in unit.hf_names]
        return [self.rows(name, unit.expert, unit.expert + 1)[0] for name in unit.hf_names]

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
    buffer = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8)
    with entry.file.open("rb") as file:
        file.seek(offset)
        got = file.readinto(buffer.numpy())
    assert got == buffer.numel(), (entry.file, got)
    return buffer.view(dtype).view(shape)


def write_tensors(
    file: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
    on_bytes: Callable[[int], object],
) -> None:
    """One safetensors file of ``shapes``' tensors, which ``tensors`` gives in that order.

    Each is read back and compared before the next is asked for; RuntimeError where the file holds
    another. ``on_bytes`` is told of each one's size.
    """
    header = _header(shapes)
    with file.open("w+b", buffering=0) as opened:
        opened.write(header)
        for (name, (shape, dtype)), (given, tensor) in zip(shapes.items(), tensors, strict=True):
            assert (given, tuple(tensor.shape), tensor.dtype) == (name, shape, dtype), given
            data = tensor.contiguous().view(-1).view(torch.uint8)
            offset = opened.tell()
            write_all(opened, data)
            back = torch.empty_like(data)
            opened.seek(offset)
            if opened.readinto(back.numpy()) != data.numel() or not same_bytes(data, back):
                raise RuntimeError(f"{file}: {name} reads back otherwise than it was written")
            on_bytes(data.numel())


def write_all(opened: RawIOBase, data: Tensor) -> None:
    """All of a uint8 tensor: the kernel may take a part of a large write."""
    left = memoryview(data.numpy())
    while left:
        left = left[opened.write(left) or 0 :]


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN or not; eight bytes at a time, since byte by byte torch is slow."""
    left, right = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (a, b))
    if left.numel() != right.numel():
        return False
    whole = left.numel() // 8 * 8
    same = torch.equal(left[whole:], right[whole:])
    return same and torch.equal(left[:whole].view(torch.int64), right[:whole].view(torch.int64))


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
