"""Memory for a chunk's logits and for a weight gradient that is elsewhere."""

import math
import mmap

import torch
from torch import Tensor


class Workspace:
    """The logits of the chunks in flight. A caller that keeps one from call to call (of one size
    or another, one call at a time) spares a CPU the fresh pages: up to a third of the loss's time,
    for glibc gives large freed memory back to the kernel at once."""

    def __init__(self) -> None:
        self._flat: list[Tensor] = []  # fp32, one for each buffer in use

    def logits(self, count: int, shape: tuple[int, int], device: torch.device) -> list[Tensor]:
        """``count`` uninitialised fp32 [C, V]; they hold until the next call."""
        size = math.prod(shape)
        fits = [each for each in self._flat if each.numel() >= size and each.device == device]
        missing = range(count - len(fits))
        fits += [torch.empty(size, dtype=torch.float32, device=device) for _ in missing]
        self._flat = fits[:count]
        return [each[:size].view(shape) for each in self._flat]


def zeros_never_read(like: Tensor) -> Tensor:
    """Zeros that most likely nobody reads: on a CPU they take an address, no memory."""
    if like.device.type != "cpu" or like.numel() == 0:
        return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    pages = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, like.dtype.itemsize * like.numel(), flags=pages)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)
