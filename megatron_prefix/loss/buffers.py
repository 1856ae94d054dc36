"""Memory for a chunk's logits and for the weight gradient."""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

# Above this size glibc gives freed memory back to the kernel at once, so that every call would pay
# for fresh pages again: a tenth of the loss's time at 4 KiB a page, 3% at 2 MiB.
_GLIBC_KEEPS_BELOW = 32 << 20


class Workspace:
    """The logits of the chunks in flight. A caller that keeps one from call to call (of one size
    or another, one call at a time) spares a CPU the fresh pages."""

    def __init__(self) -> None:
        self._flat: list[Tensor] = []  # fp32, one for each buffer in use

    def logits(self, count: int, shape: tuple[int, int], device: torch.device) -> list[Tensor]:
        """``count`` uninitialised fp32 [C, V]; they hold until the next call."""
        size = math.prod(shape)
        fits = [each for each in self._flat if each.numel() >= size and each.device == device]
        missing = range(count - len(fits))
        self._flat = (fits + [_empty_fp32((size,), device) for _ in missing])[:count]
        return [each[:size].view(shape) for each in self._flat]


def _empty_fp32(shape: Sequence[int], device: torch.device) -> Tensor:
    huge = _huge_zeros(shape, device)
    return torch.empty(shape, dtype=torch.float32, device=device) if huge is None else huge


def zeros_fp32(shape: Sequence[int], device: torch.device) -> Tensor:
    """On a CPU in huge pages where it is large and they can be had."""
    huge = _huge_zeros(shape, device)
    return torch.zeros(shape, dtype=torch.float32, device=device) if huge is None else huge


def _huge_zeros(shape: Sequence[int], device: torch.device) -> Tensor | None:
    size = 4 * math.prod(shape)
    if device.type != "cpu" or size < _GLIBC_KEEPS_BELOW or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them: small pages do as well
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(*shape)
