"""Memory for a chunk's logits."""

import contextlib
import math
import mmap

import torch
from torch import Tensor

# Above this size glibc gives freed memory back to the kernel at once, so that every call would pay
# for fresh pages again: a tenth of the loss's time at 4 KiB a page, 2% at 2 MiB.
_GLIBC_KEEPS_BELOW = 32 << 20


def logits_buffer(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Uninitialised fp32 [C, V]; on a CPU in huge pages where it is large and they can be had."""
    size = 4 * math.prod(shape)
    if device.type != "cpu" or size < _GLIBC_KEEPS_BELOW or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=torch.float32, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them: small pages do as well
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)
