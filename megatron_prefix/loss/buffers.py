"""Memory for a chunk's logits and for a weight gradient that is elsewhere."""

import contextlib
import math
import mmap

import torch
from torch import Tensor


class Workspace:
    """The logits of the chunks in flight. A caller that keeps one from call to call (of one size
    or another, one call at a time) spares a CPU the fresh pages: up to a third of the loss's time,
    for glibc gives large freed memory back to the kernel at once.

    ``huge_pages``: worth some percent on a CPU for memory that is kept; for memory that is not,
    they can cost more than they save (in virtual machines that hand free ones back to the host).
    """

    def __init__(self, *, huge_pages: bool = True) -> None:
        self._huge_pages = huge_pages
        self._flat: list[Tensor] = []  # fp32, one for each buffer in use

    def logits(self, count: int, shape: tuple[int, int], device: torch.device) -> list[Tensor]:
        """``count`` uninitialised fp32 [C, V]; they hold until the next call."""
        size = math.prod(shape)
        fits = [each for each in self._flat if each.numel() >= size and each.device == device]
        fits += [self._empty(size, device) for _ in range(count - len(fits))]
        self._flat = fits[:count]
        return [each[:size].view(shape) for each in self._flat]

    def _empty(self, size: int, device: torch.device) -> Tensor:
        if device.type != "cpu" or size == 0 or not self._huge_pages:
            return torch.empty(size, dtype=torch.float32, device=device)
        return _fresh_pages(size, torch.float32, huge=True)


def zeros_never_read(like: Tensor) -> Tensor:
    """Zeros that most likely nobody reads: on a CPU they take an address, no memory."""
    if like.device.type != "cpu" or like.numel() == 0:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    return _fresh_pages(like.numel(), like.dtype, huge=False).view(like.shape)


def _fresh_pages(size: int, dtype: torch.dtype, *, huge: bool) -> Tensor:
    """Memory that the kernel gives, zeroed, page by page when it is first touched."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, dtype.itemsize * size, flags=private)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them: small pages do as well
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
