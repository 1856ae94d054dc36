"""Qwen3 dense (Qwen3ForCausalLM): RMS norms on queries and keys, no biases."""

from typing import Any

from megatron_prefix.mcore.hf_map.checks import refuse_biases, refuse_qwen_variants
from megatron_prefix.mcore.hf_map.layers import dense_units
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.mcore.hf_map.units import Unit

ARCHITECTURE = "Qwen3ForCausalLM"


def transformer_settings(shape: DecoderShape, hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields beyond the shared sizes; ValueError for an unsupported variant."""
    refuse_qwen_variants(hf, "Qwen3")
    refuse_biases(hf, "Qwen3", "attention_bias")
    return {"qk_layernorm": True}


def units(shape: DecoderShape, hf: dict[str, Any]) -> list[Unit]:
    return dense_units(shape, qk_norm=True, qkv_bias=False)
