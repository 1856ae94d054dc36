"""Files whose every byte is read back and compared, and memory that is used again.

Fresh memory costs the kernel more than a copy does, so tensors are read into the same memory unit
after unit. A piece is compared right after it is written, while the processor's cache has it. The
kernel is asked to begin with the disk early: the flush at the end then has little left to wait for.
"""

import ctypes
import os
from collections.abc import Buffer, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from io import RawIOBase
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

PIECE = 2**19  # bytes: few enough that a piece is in the caches still when it is read back
_ALIGNED = 64
_BEGIN_EVERY = 2**25  # bytes after which the kernel starts to put them on the disk
_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: begin, and do not wait
_libc = ctypes.CDLL(None)
_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
_memcmp = _libc.memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Scratch:
    """Memory for one unit's tensors, and then for the next one's in their place."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def clear(self) -> None:
        self._used = 0

    def take(self, size: int) -> Tensor:
        """uint8 [size], of any content; lasts until ``clear`` and is its user's alone till then."""
        end = self._used + size
        if end > len(self._memory):  # what was taken before keeps the old memory alive
            self._memory, self._used, end = torch.empty(end, dtype=torch.uint8), 0, size
        taken = self._memory[self._used : end]
        self._used = -(-end // _ALIGNED) * _ALIGNED
        return taken


class CheckedFile:
    """A new file that grows; RuntimeError where it holds another byte than it was given.

    ``read_back`` is given its bytes in their order, as they came back from it. ``write`` and
    ``flush`` are what torch.save asks of a file. Short writes wait for the next long one, or for
    ``flush``.
    """

    def __init__(
        self, path: Path, read_back: Callable[[Buffer], object] = lambda piece: None
    ) -> None:
        self._path, self._file = path, path.open("w+b", buffering=0)
        self._read_back = read_back
        self._back = np.empty(PIECE, dtype=np.uint8)
        self._short = bytearray()
        self._in_file = self._begun = 0

    @property
    def size(self) -> int:
        """Bytes, with what still waits."""
        return self._in_file + len(self._short)

    def write(self, data: Buffer) -> int:
        if not memoryview(data).nbytes:  # which could not be cast
            return 0
        view = memoryview(data).cast("B")
        if len(view) + len(self._short) < PIECE:
            self._short += view
        else:
            self.flush()
            self._append(view)
        return len(view)

    def flush(self) -> None:
        short, self._short = self._short, bytearray()
        self._append(memoryview(short))

    def _append(self, view: memoryview) -> None:
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            left = piece
            while left:  # the kernel may take a part
                left = left[self._file.write(left) or 0 :]
            back = self._back[: len(piece)]
            got = os.preadv(self._file.fileno(), [back], self._in_file)
            if got != len(piece) or not _same(np.frombuffer(piece, dtype=np.uint8), back):
                raise RuntimeError(f"{self._path} reads back otherwise than it was written")
            self._read_back(back)
            self._in_file += len(piece)
            self._begin()

    def _begin(self) -> None:
        """Where the kernel cannot, the flush at the end does all of it."""
        if (size := self._in_file - self._begun) >= _BEGIN_EVERY:
            _sync_file_range(self._file.fileno(), self._begun, size, _SYNC_FILE_RANGE_WRITE)
            self._begun = self._in_file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._file:
            if kind is None:
                self.flush()

    def close(self) -> None:
        with self._file:
            self.flush()


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Of two uint8 arrays. NumPy's comparison writes an array of answers; this one reads alone."""
    return _memcmp(a.ctypes.data, b.ctypes.data, len(a)) == 0


class Behind:
    """Makes one call at a time in a thread, while its caller prepares the next.

    When ``submit`` returns, the call before it is done, and that call's memory may be used again.
    What a call raises, the next ``submit`` or the end of the block raises.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[Any] | None = None

    def submit(self, call: Callable[..., object], *arguments: object) -> None:
        self._wait()
        self._last = self._thread.submit(call, *arguments)

    def _wait(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._thread.shutdown()
        if kind is None:
            self._wait()


def read_into(file: RawIOBase, start: int, memory: Tensor) -> None:
    """All of a uint8 tensor from byte ``start`` on: the kernel may give a part of a large read."""
    left = memoryview(memory.numpy())
    file.seek(start)
    while left:
        got = file.readinto(left)
        assert got, (file, start, len(left))
        left = left[got:]
