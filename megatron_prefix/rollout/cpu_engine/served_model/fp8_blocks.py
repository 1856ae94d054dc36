"""FP8 weights with a scale a block, served by a CPU for which SGLang has no FP8 kernel.

SGLang's FP8 layers assert AMX kernels on a CPU. Here its own configuration, parameters and loader
take such a checkpoint as ever, names, shapes and scales; each layer is then dequantised, once, and
goes on as SGLang's layer of plain weights. So the weights are a GPU server's, but activations are
not rounded to FP8, and weights cannot be exchanged later: the scales are gone.
"""

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8LinearMethod, Fp8MoEMethod
from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant
from sglang.srt.layers.quantization.unquant import (
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
)

_TO_FP32 = [torch.bfloat16, torch.half, torch.float32]  # fp32 is what tests compare in


def serve() -> None:
    """Called in the scheduler's process, before it makes a model."""
    Fp8Config.get_supported_act_dtypes = classmethod(lambda cls: _TO_FP32)
    Fp8LinearMethod.process_weights_after_loading_block_quant = _make_linear_plain
    Fp8MoEMethod.process_weights_after_loading_block_quant = _make_experts_plain


def serve_latent_attention() -> None:
    """DeepSeek keeps products of an up-projection beside it, made before the above is called."""
    from sglang.srt.models.deepseek_common import deepseek_weight_loader

    deepseek_weight_loader.block_quant_to_tensor_quant = _plain_without_a_scale


def _plain_without_a_scale(
    weight: torch.Tensor, scale: torch.Tensor, block: list[int]
) -> tuple[torch.Tensor, None]:
    """Where SGLang would quantise anew, with one scale a tensor; it loads in the model's dtype."""
    return block_quant_dequant(weight, scale, block, torch.get_default_dtype()), None


def _make_linear_plain(method: Fp8LinearMethod, layer: LinearBase) -> None:
    _dequantise(layer, "weight", method.weight_block_size)
    layer.quant_method = UnquantizedLinearMethod()


def _make_experts_plain(method: Fp8MoEMethod, layer: FusedMoE) -> None:
    for name in ("w13_weight", "w2_weight"):
        _dequantise(layer, name, method.weight_block_size)
    layer.quant_method = UnquantizedFusedMoEMethod()
    layer.quant_method.create_moe_runner(layer, layer.moe_runner_config)


def _dequantise(layer: torch.nn.Module, name: str, block: list[int]) -> None:
    weight, scale = getattr(layer, name), getattr(layer, f"{name}_scale_inv")
    plain = block_quant_dequant(weight.data, scale.data, block, layer.params_dtype)
    setattr(layer, name, torch.nn.Parameter(plain, requires_grad=False))
    delattr(layer, f"{name}_scale_inv")
