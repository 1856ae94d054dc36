"""Files of Megatron's distributed checkpoint (torch's DCP format), one tensor in memory at a time.

DCP's own writer keeps every tensor of a file alive until the file ends, and its planners want all
of a model's tensors at once; the format itself is simple: tensors that torch.save wrote, one behind
another, and a pickled table of where they are.
"""

import hashlib
import io
import pickle
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

from megatron_prefix.mcore.dist_keys import Place
from megatron_prefix.mcore.tensor_files import same_bytes, write_all

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
    """One data file in the making, read back as it grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("w+b", buffering=0)
        self._sum = hashlib.sha256()
        self._threads = ThreadPoolExecutor(1)  # the sum of one block while the next is made
        self._summing: Future[None] | None = None
        self.written: list[Written] = []

    def add(self, place: Place, tensor: Tensor) -> None:
        """``tensor`` has the block's size. RuntimeError where it reads back otherwise."""
        data = tensor.view(place.size)
        if data.untyped_storage().nbytes() != data.nbytes:
            data = data.clone()  # torch.save writes the whole of a view's storage
        start, content = self._save(data)
        back = torch.load(io.BytesIO(content), weights_only=True)
        if back.shape != data.shape or not same_bytes(back, data):
            raise RuntimeError(f"{self._path}: {place.key} reads back otherwise than written")
        self.written.append(Written(place, data.dtype, self._path.name, start, len(content)))

    def add_common(self) -> _StorageInfo:
        """What is no tensor: nothing, but Megatron looks for it."""
        start, content = self._save([{}])
        return _StorageInfo(self._path.name, start, len(content))

    def _save(self, data: object) -> tuple[int, bytearray]:
        start = self._file.tell()
        made = io.BytesIO()
        with without_checksums({"save.compute_crc32": False}):  # the manifest has better ones
            torch.save(data, made)
        write_all(self._file, torch.frombuffer(made.getbuffer(), dtype=torch.uint8))
        content = bytearray(made.tell())
        self._file.seek(start)
        got = self._file.readinto(content)
        assert got == len(content), (self._path, got)
        self._wait()
        self._summing = self._threads.submit(self._sum.update, content)
        return start, content

    def _wait(self) -> None:
        if self._summing is not None:
            self._summing.result()

    def close(self) -> str:
        """The file's SHA-256."""
        self._wait()
        self._threads.shutdown()
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

    def __post_init__(self) -> None:
        self.table = FileSystemReader(self.folder).read_metadata()

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Of a whole tensor; None where the checkpoint has none of that name."""
        there = self.table.state_dict_metadata.get(key)
        return tuple(there.size) if isinstance(there, TensorStorageMetadata) else None

    def read(self, place: Place) -> Tensor:
        """The block, [*place.size]."""
        found: list[tuple[Tensor, tuple[slice, ...]]] = []
        for chunk in self._chunks(place):
            pairs = zip(chunk.offsets, chunk.sizes, place.offset, place.size, strict=True)
            lows, highs = [], []
            for at, length, wanted, size in pairs:
                lows.append(max(at, wanted))
                highs.append(min(at + length, wanted + size))
            if all(low < high for low, high in zip(lows, highs, strict=True)):
                bounds = list(zip(lows, highs, strict=True))
                part = self._load(place.key, chunk)[_slices(bounds, chunk.offsets)]
                found.append((part, _slices(bounds, place.offset)))
        if len(found) == 1 and found[0][0].shape == torch.Size(place.size):
            return found[0][0]
        assert found, place
        whole = torch.empty(place.size, dtype=found[0][0].dtype)
        for part, there in found:
            whole[there] = part
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

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        where = self.table.storage_data[MetadataIndex(key, chunk.offsets)]
        with (self.folder / where.relative_path).open("rb") as file:
            file.seek(where.offset)
            content = io.BytesIO(file.read(where.length))
        return torch.load(content, weights_only=True, map_location="cpu")


def _slices(bounds: list[tuple[int, int]], origin: Sequence[int]) -> tuple[slice, ...]:
    pairs = zip(bounds, origin, strict=True)
    return tuple(slice(low - at, high - at) for (low, high), at in pairs)
