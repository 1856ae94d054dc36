"""What Megatron-Core 0.19.2 leaves to do for experts with biases, sinks among them (GPT-OSS)."""

import torch
from megatron.core.tensor_parallel.layers import (
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

GATE_SLOPE = 1.702  # of the sigmoid that approximates GELU


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x). Megatron-Core's is the same, and compiles itself for seconds."""
    return x * torch.sigmoid(GATE_SLOPE * x)


class ExpertOutput(RowParallelLinear):
    """Without Transformer Engine: an expert's last layer, whose output can be added to in place.

    Megatron's MLP does so with the bias, and autograd refuses it where the output is its input, as
    it is on one tensor-parallel rank.
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        output, bias = super().forward(input_)
        return output.clone(), bias


def finish_biased_experts(module: nn.Module) -> None:
    """Call it on a model that was built, before it is wrapped; others are left alone.

    Sinks are cut over tensor-parallel ranks: unmarked, the gradient norm would count the first
    rank's alone. The output bias of an expert is marked as if its gradient were still to be summed
    over tensor-parallel ranks under sequence parallelism; there lie other experts', or replicas
    that are summed already.
    """
    for part in module.modules():
        if type(part) is RowParallelLinear and part.is_expert and part.bias is not None:
            part.__class__ = ExpertOutput
    for name, parameter in module.named_parameters():
        if name.endswith("core_attention.softmax_offset"):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        elif ".experts." in name and ".bias" in name:
            parameter.sequence_parallel = False  # type: ignore[attr-defined]
