"""FP8 weights with one scale a block of 128 x 128, as DeepSeek-V3 publishes them (arXiv 2412.19437,
section 3.3): ``weight`` in e4m3 and, beside it, ``weight_scale_inv`` in fp32, which multiplies.

Legend: R rows, C columns, r and c the blocks over them, rounded up.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prefix.hf_folder import BLOCK
from megatron_prefix.mcore.hf_map import HfModel
from megatron_prefix.mcore.hf_map.units import Unit

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[R, C] of any float dtype -> e4m3 [R, C] and fp32 [r, c]; a block of zeros has scale 1."""
    rows, columns = weight.shape
    blocks = _blocks(weight.float())
    largest = blocks.abs().amax(dim=(1, 3))
    scale = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    quantized = (blocks / scale[:, None, :, None]).to(E4M3)
    whole = quantized.flatten(2, 3).flatten(0, 1)
    return whole[:rows, :columns].contiguous(), scale


def dequantize_blocks(quantized: Tensor, scale: Tensor) -> Tensor:
    """The inverse: e4m3 [R, C] and fp32 [r, c] -> fp32 [R, C]."""
    rows, columns = quantized.shape
    blocks = _blocks(quantized.float()) * scale[:, None, :, None]
    return blocks.flatten(2, 3).flatten(0, 1)[:rows, :columns].contiguous()


def _blocks(weight: Tensor) -> Tensor:
    """[R, C] -> [r, 128, c, 128], zeros past its edges."""
    padding = (0, -weight.shape[1] % BLOCK, 0, -weight.shape[0] % BLOCK)
    padded = F.pad(weight, padding) if any(padding) else weight
    return padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))


def block_grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a weight."""
    return tuple(-(-size // BLOCK) for size in shape)


def quantization_config(not_quantized: list[str]) -> dict[str, Any]:
    """What config.json says of such weights; ``not_quantized``: linear modules left as they are."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": not_quantized,
    }


def quantized(unit: Unit, hf: HfModel) -> bool:
    """Whether FP8 weights have this unit in FP8: linear layers of the trunk, but no router."""
    inside = 0 <= unit.layer < hf.shape.num_layers and not unit.stacked
    return inside and len(unit.shape) == 2 and "router" not in unit.megatron_name


def cut_blocks(hf: HfModel) -> list[str]:
    """Tensors whose rows are no whole blocks, though SGLang puts others under them: it refuses to
    serve such a model in FP8."""
    return [
        name
        for unit, after in zip(hf.units, [*hf.units[1:], hf.units[0]], strict=True)
        if quantized(unit, hf) and (len(unit.hf_names) > 1 or after.with_previous)
        for name, shape in zip(unit.hf_names, unit.hf_shapes, strict=True)
        if shape[0] % BLOCK
    ]
