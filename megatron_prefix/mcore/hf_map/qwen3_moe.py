"""Qwen3-MoE (Qwen3MoeForCausalLM): Qwen3's attention; experts in all layers or in some."""

from typing import Any

from megatron_prefix.mcore.hf_map.checks import refuse_biases, refuse_qwen_variants
from megatron_prefix.mcore.hf_map.layers import (
    GATE_UP_DOWN,
    attention_units,
    embedding_units,
    mlp_units,
    moe_units,
)
from megatron_prefix.mcore.hf_map.moe import routing_settings
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.mcore.hf_map.units import Unit

ARCHITECTURE = "Qwen3MoeForCausalLM"


def transformer_settings(shape: DecoderShape, hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields beyond the shared sizes; ValueError for an unsupported variant."""
    refuse_qwen_variants(hf, "Qwen3-MoE")
    refuse_biases(hf, "Qwen3-MoE", "attention_bias")
    normalised = bool(hf.get("norm_topk_prob"))
    return {"qk_layernorm": True} | routing_settings(shape, hf, normalised=normalised)


def units(shape: DecoderShape, hf: dict[str, Any]) -> list[Unit]:
    units = embedding_units(shape)
    for layer in range(shape.num_layers):
        units += attention_units(shape, layer, qk_norm=True, qkv_bias=False)
        if layer in shape.sparse_layers:
            units += moe_units(shape, layer, block="mlp", parts=GATE_UP_DOWN)
        else:
            units += mlp_units(shape, layer)
    return units
