"""Files of Megatron's distributed checkpoint (torch's DCP format), one tensor in memory at a time.

DCP's own writer keeps every tensor of a file alive until the file ends, and its planners want all
of a model's tensors at once; the format itself is simple: tensors that torch.save wrote, one behind
another, and a pickled table of where they are.
"""

import io
import pickle
from collections.abc import Buffer, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import torch
import torch.utils.serialization as serialization
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_prefix.mcore.checked_files import CheckedFile, Scratch, read_into
from megatron_prefix.mcore.dist_keys import Place
from megatron_prefix.mcore.manifest import new_sum

without_checksums: Any = serialization.config.patch  # type: ignore[attr-defined]
# What Megatron keeps beside tensors; of weights alone there is nothing.
COMMON = ShardedObject("common_state", None, (1,), (0,)).unique_key


@dataclass(frozen=True)
class Written:
    """A block and where its bytes are."""

    place: Place
    dtype: torch.dtype
    file: str
    start: int
    length: int


class DistFile:
    """One data file in the making: read back, compared and hashed as it grows.

    ``close`` it within its block, which closes it after an error too.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._sum = path, new_sum()
        self._file = CheckedFile(path, self._sum.update)
        self.written: list[Written] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.__exit__(kind, error, trace)

    def add(self, place: Place, tensor: Tensor) -> None:
        """``tensor`` has the block's size. RuntimeError where it reads back otherwise."""
        # torch.save writes the whole of a view's storage: this one is of a storage of its own.
        data = torch.frombuffer(
            tensor.contiguous().view(-1).view(torch.uint8).numpy(), dtype=tensor.dtype
        )
        start, length = self._save(data.view(place.size))
        self.written.append(Written(place, data.dtype, self._path.name, start, length))

    def add_common(self) -> _StorageInfo:
        """What is no tensor: nothing, but Megatron looks for it."""
        start, length = self._save([{}])
        return _StorageInfo(self._path.name, start, length)

    def _save(self, data: object) -> tuple[int, int]:
        start = self._file.size
        with without_checksums({"save.compute_crc32": False}):  # the manifest has better ones
            torch.save(data, cast(IO[bytes], self._file))  # what it calls is there
        self._file.flush()
        return start, self._file.size - start

    def close(self) -> str:
        """The file's sum, for the manifest."""
        self._file.close()
        return self._sum.hexdigest()


def write_table(folder: Path, written: Sequence[Written], common: _StorageInfo) -> None:
    """What makes the data files of ``folder`` a checkpoint of Megatron's."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {MetadataIndex(COMMON): common}
    for block in written:
        place, offset = block.place, torch.Size(block.place.offset)
        tensor = tensors.setdefault(
            place.key,
            TensorStorageMetadata(
                TensorProperties(dtype=block.dtype), torch.Size(place.whole), chunks=[]
            ),
        )
        tensor.chunks.append(ChunkStorageMetadata(offset, torch.Size(place.size)))
        where = _StorageInfo(block.file, block.start, block.length)
        storage[MetadataIndex(place.key, offset)] = where
    table = Metadata(
        {**tensors, COMMON: BytesStorageMetadata()},
        storage_data=storage,
        storage_meta=StorageMeta(),
        version=CURRENT_DCP_VERSION,
    )
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


@dataclass
class DistReader:
    """Blocks of a checkpoint's tensors, from whatever blocks they were written in."""

    folder: Path
    table: Metadata = field(init=False)
    _by_first: dict[str, dict[int, list[ChunkStorageMetadata]]] = field(default_factory=dict)
    _part: Scratch = field(default_factory=Scratch)

    def __post_init__(self) -> None:
        self.table = FileSystemReader(self.folder).read_metadata()

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Of a whole tensor; None where the checkpoint has none of that name."""
        there = self.table.state_dict_metadata.get(key)
        return tuple(there.size) if isinstance(there, TensorStorageMetadata) else None

    def read(self, place: Place, scratch: Scratch) -> Tensor:
        """The block [*place.size] in the checkpoint's dtype.

        It is a view of ``scratch``, and lasts until that is cleared.
        """
        found = [(c, bounds) for c in self._chunks(place) if (bounds := _overlap(place, c))]
        assert found, place
        if len(found) == 1:
            chunk, bounds = found[0]
            part = self._load(place.key, chunk, scratch)[_slices(bounds, chunk.offsets)]
            if part.shape == torch.Size(place.size):
                return part
        tensor = self.table.state_dict_metadata[place.key]
        assert isinstance(tensor, TensorStorageMetadata), place
        dtype = tensor.properties.dtype
        whole = scratch.take(prod(place.size) * dtype.itemsize).view(dtype).view(place.size)
        for chunk, bounds in found:
            self._part.clear()
            part = self._load(place.key, chunk, self._part)
            whole[_slices(bounds, place.offset)] = part[_slices(bounds, chunk.offsets)]
        return whole

    def _chunks(self, place: Place) -> list[ChunkStorageMetadata]:
        """Those that may overlap: of a stack only the ones in its place along the first axis."""
        if place.key not in self._by_first:
            by_first: dict[int, list[ChunkStorageMetadata]] = {}
            tensor = self.table.state_dict_metadata[place.key]
            assert isinstance(tensor, TensorStorageMetadata), place
            for chunk in tensor.chunks:
                first = int(chunk.offsets[0]) if chunk.sizes[0] == 1 else -1
                by_first.setdefault(first, []).append(chunk)
            self._by_first[place.key] = by_first
        by_first = self._by_first[place.key]
        if place.size[0] == 1:
            return by_first.get(place.offset[0], []) + by_first.get(-1, [])
        return [chunk for chunks in by_first.values() for chunk in chunks]

    def _load(self, key: str, chunk: ChunkStorageMetadata, scratch: Scratch) -> Tensor:
        where = self.table.storage_data[MetadataIndex(key, chunk.offsets)]
        with (self.folder / where.relative_path).open("rb", buffering=0) as file:
            window = cast(IO[bytes], _Window(file, where.offset, where.length))
            outline = torch.load(window, weights_only=True, map_location="meta")
            storage = outline.untyped_storage()
            if not outline.is_contiguous() or storage.nbytes() != outline.nbytes:
                window.seek(0)
                return torch.load(window, weights_only=True, map_location="cpu")
            memory = scratch.take(outline.nbytes)
            read_into(file, where.offset + storage._checkpoint_offset, memory)
        return memory.view(outline.dtype).view(outline.shape)


class _Window(io.RawIOBase):
    """Part of a file, as a file: what torch.save wrote there."""

    def __init__(self, file: io.RawIOBase, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}
        self._at = origin[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, into: Buffer) -> int:
        view = memoryview(into).cast("B")[: max(0, self._length - self._at)]
        self._file.seek(self._start + self._at)
        got = self._file.readinto(view) or 0
        self._at += got
        return got


def _overlap(place: Place, chunk: ChunkStorageMetadata) -> list[tuple[int, int]]:
    """First and last place, along each axis, that both have; empty where they share nothing."""
    pairs = zip(chunk.offsets, chunk.sizes, place.offset, place.size, strict=True)
    bounds = [(max(at, low), min(at + n, low + size)) for at, n, low, size in pairs]
    return bounds if all(low < high for low, high in bounds) else []


def _slices(bounds: list[tuple[int, int]], origin: Sequence[int]) -> tuple[slice, ...]:
    pairs = zip(bounds, origin, strict=True)
    return tuple(slice(low - at, high - at) for (low, high), at in pairs)
