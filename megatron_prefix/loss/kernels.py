"""Which elementwise kernels a device gets."""

from typing import Protocol

import torch
from torch import Tensor

from megatron_prefix.loss import native_kernels, torch_kernels
from megatron_prefix.loss.divergence import Divergence, Merged, WholeRows


class Kernels(Protocol):
    """The passes over a chunk's logits, fp32 [C, V] each, contiguous.

    What a pass leaves in the two buffers is for the next pass of the same kernels alone. V may
    be 0, but not for ``one_rank``. ``torch_kernels`` documents the values.
    """

    def one_rank(
        self,
        student: Tensor,
        teacher: Tensor,
        token_weight: Tensor | None,
        divergence: Divergence,
    ) -> WholeRows: ...

    def statistics(self, student: Tensor, teacher: Tensor, divergence: Divergence) -> Tensor: ...

    def mixture(
        self, student: Tensor, teacher: Tensor, merged: Merged, divergence: Divergence
    ) -> Tensor: ...

    def logit_gradient(
        self,
        student: Tensor,
        teacher: Tensor,
        first: Tensor,
        second: Tensor,
        divergence: Divergence,
    ) -> Tensor: ...


def kernels_for(device: torch.device) -> Kernels:
    if device.type == "cpu" and native_kernels.library() is not None:
        return native_kernels
    return torch_kernels
