"""Qwen2 and Qwen2.5 (Qwen2ForCausalLM): biases on queries, keys and values, no norms on them."""

from typing import Any

from megatron_prefix.mcore.hf_map.checks import refuse_qwen_variants
from megatron_prefix.mcore.hf_map.layers import dense_units
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.mcore.hf_map.units import Unit

ARCHITECTURE = "Qwen2ForCausalLM"


def transformer_settings(shape: DecoderShape, hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields beyond the shared sizes; ValueError for an unsupported variant."""
    refuse_qwen_variants(hf, "Qwen2")
    return {"qk_layernorm": False, "add_qkv_bias": True}


def units(shape: DecoderShape, hf: dict[str, Any]) -> list[Unit]:
    return dense_units(shape, qk_norm=False, qkv_bias=True)
