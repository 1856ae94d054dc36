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


def empty_fp32(shape: Sequence[int], device: torch.device) -> Tensor:
    """Uninitialised; on a CPU in huge pages where it is large and they can be had."""
    huge = _huge_zeros(shape, device)
    return torch.empty(shape, dtype=torch.float32, device=device) if huge is None else huge


def zeros_fp32(shape: Sequence[int], device: torch.device) -> Tensor:
    """As ``empty_fp32``, zero: the kernel's fresh pages are so anyhow."""
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
