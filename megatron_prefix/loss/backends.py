"""Which elementwise kernels a device gets."""

import torch

from megatron_prefix.loss import native_kernels
from megatron_prefix.loss.kernels import Kernels
from megatron_prefix.loss.torch_kernels import TorchKernels


def kernels_for(device: torch.device) -> Kernels:
    if device.type == "cuda":
        # Imported here: a torch without CUDA brings no Triton.
        from megatron_prefix.loss.triton_kernels import TritonKernels

        return TritonKernels()
    if device.type == "cpu" and native_kernels.library() is not None:
        return native_kernels.NativeKernels()
    return TorchKernels()
