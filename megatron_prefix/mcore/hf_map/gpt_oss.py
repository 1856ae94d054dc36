"""GPT-OSS (GptOssForCausalLM): attention with a sink per head and a sliding window in some layers,
YaRN, biases everywhere, experts in every layer with a clamped gate (arXiv 2508.10925, section 2).

Legend: E experts, H hidden size, F columns of an expert.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.mcore.hf_map.checks import require_published, rope_settings
from megatron_prefix.mcore.hf_map.layers import attention_units, embedding_units, mlp_norm
from megatron_prefix.mcore.hf_map.moe import routing_settings
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.mcore.hf_map.units import Unit

ARCHITECTURE = "GptOssForCausalLM"
WINDOWED, FULL = "sliding_attention", "full_attention"
# The gate's slope is built into Megatron-Core's quick_gelu.
PUBLISHED = {"attention_bias": True, "attention_dropout": 0.0, "swiglu_alpha": 1.702}


def transformer_settings(shape: DecoderShape, hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields beyond the shared sizes; ValueError for an unsupported variant."""
    require_published(hf, "GPT-OSS", **PUBLISHED)
    return {
        "qk_layernorm": False,
        "add_bias_linear": True,
        "softmax_type": "learnable",
        "glu_linear_offset": 1.0,
        "activation_func_clamp_value": float(hf.get("swiglu_limit", 7.0)),
        # Megatron-Core's grouped experts refuse it beside biases.
        "bias_dropout_fusion": False,
        **_windows(hf),
        **_rotary(hf),
        **routing_settings(shape, hf, normalised=True),
    }


def _windows(hf: dict[str, Any]) -> dict[str, Any]:
    """Which layers see the last ``sliding_window`` tokens alone, the token itself counted."""
    kinds = hf["layer_types"]
    if unknown := sorted(set(kinds) - {WINDOWED, FULL}):
        raise ValueError(f"layer_types has {unknown[0]!r}: GPT-OSS has {WINDOWED} and {FULL}")
    if len(kinds) != hf["num_hidden_layers"]:
        raise ValueError(
            f"layer_types names {len(kinds)} layers and num_hidden_layers is "
            f"{hf['num_hidden_layers']}; give the config.json of this checkpoint"
        )
    window = hf.get("sliding_window") or 0
    if WINDOWED not in kinds:
        return {}
    if window < 1:
        raise ValueError(
            f"sliding_window={hf.get('sliding_window')}: {WINDOWED} needs 1 token or more"
        )
    # Megatron-Core counts the tokens before and after the token itself.
    return {
        "window_size": (window - 1, 0),
        "window_attn_skip_freq": [int(kind == WINDOWED) for kind in kinds],
    }


def _rotary(hf: dict[str, Any]) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071), or plain rope."""
    if not (hf.get("rope_parameters") or {}).get("rope_theta") and not hf.get("rope_theta"):
        raise ValueError("config.json has no rope_theta; give the published config")
    kind, rope = rope_settings(hf)
    if kind == "default":
        return {}
    if kind != "yarn":
        raise ValueError(f"rope_type={kind!r}: GPT-OSS is supported with 'default' or 'yarn'")
    if rope.get("attention_factor") is not None:
        raise ValueError(
            f"rope attention_factor={rope['attention_factor']}: GPT-OSS is supported without it"
        )
    scaled = bool(rope.get("mscale") and rope.get("mscale_all_dim"))
    return {
        "yarn_rotary_scaling_factor": float(rope["factor"]),
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": float(rope.get("beta_fast") or 32.0),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1.0),
        "yarn_mscale": float(rope["mscale"]) if scaled else None,
        "yarn_mscale_all_dim": float(rope["mscale_all_dim"]) if scaled else None,
        "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
        "apply_rope_fusion": False,  # Transformer Engine's kernel has no scale
    }


def units(shape: DecoderShape, hf: dict[str, Any]) -> list[Unit]:
    units = embedding_units(shape)
    for layer in range(shape.num_layers):
        units += attention_units(shape, layer, qk_norm=False, qkv_bias=True)
        units += _sink_units(shape, layer)
        units += [mlp_norm(shape, layer), *_router_units(shape, layer)]
        units += _expert_units(shape, layer)
    return units


def _sink_units(shape: DecoderShape, layer: int) -> list[Unit]:
    """The bias of the output projection, and the sinks."""
    megatron, hf = f"decoder.layers.{layer}.self_attention.", f"model.layers.{layer}.self_attn."
    return [
        Unit(f"{megatron}linear_proj.bias", (f"{hf}o_proj.bias",), ((shape.hidden_size,),), layer),
        Unit(
            f"{megatron}core_attention.softmax_offset",
            (f"{hf}sinks",),
            ((shape.num_attention_heads,),),
            layer,
            shard_axis=0,
        ),
    ]


def _router_units(shape: DecoderShape, layer: int) -> list[Unit]:
    sizes = {"weight": (shape.num_experts, shape.hidden_size), "bias": (shape.num_experts,)}
    megatron, hf = f"decoder.layers.{layer}.mlp.router.", f"model.layers.{layer}.mlp.router."
    return [
        Unit(f"{megatron}{kind}", (f"{hf}{kind}",), (size,), layer) for kind, size in sizes.items()
    ]


def _expert_units(shape: DecoderShape, layer: int) -> list[Unit]:
    """Tensor by tensor, each of all experts: Hugging Face has them stacked, matrices [rows in,
    columns out], and gate and up in turn."""
    hidden, ffn = shape.hidden_size, shape.moe_ffn_hidden_size
    tensors: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
        "linear_fc1.weight": ("gate_up_proj", (hidden, 2 * ffn), GATE_UP),
        "linear_fc1.bias": ("gate_up_proj_bias", (2 * ffn,), GATE_UP_BIAS),
        "linear_fc2.weight": ("down_proj", (ffn, hidden), DOWN),
        "linear_fc2.bias": ("down_proj_bias", (hidden,), {}),
    }
    return [
        Unit(
            f"decoder.layers.{layer}.mlp.experts.{expert}.{name}",
            (f"model.layers.{layer}.mlp.experts.{source}",),
            (size,),
            layer,
            expert,
            stacked=shape.num_experts,
            **how,
        )
        for name, (source, size, how) in tensors.items()
        for expert in range(shape.num_experts)
    ]


def _halves(tensors: Sequence[Tensor]) -> Tensor:
    """[..., 2 * F], gate and up in turn -> [2 * F, ...], all of the gate first."""
    turned = tensors[0].mT if tensors[0].dim() > 1 else tensors[0]
    return torch.cat([turned[0::2], turned[1::2]])


def _in_turn(tensor: Tensor) -> tuple[Tensor, ...]:
    """The inverse."""
    turned = torch.stack(tensor.chunk(2), dim=1).flatten(0, 1)
    return (turned.mT.contiguous() if tensor.dim() > 1 else turned,)


GATE_UP_BIAS = {"shard_axis": 0, "blocks": 2, "pack": _halves, "unpack": _in_turn}
GATE_UP = GATE_UP_BIAS | {"turned": True}
DOWN = {
    "shard_axis": 1,
    "turned": True,
    "pack": lambda tensors: tensors[0].mT.contiguous(),
    "unpack": lambda tensor: (tensor.mT.contiguous(),),
}
