"""Qwen2 and Qwen2.5 (Qwen2ForCausalLM): biases on queries, keys and values, no norms on them."""

from typing import Any

from megatron_prefix.mcore.hf_map.checks import refuse_qwen_variants
from megatron_prefix.mcore.hf_map.units import (
    DecoderShape,
    Unit,
    attention_units,
    embedding_units,
    mlp_units,
)

ARCHITECTURE = "Qwen2ForCausalLM"


def transformer_settings(shape: DecoderShape, hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields beyond the shared sizes; ValueError for an unsupported variant."""
    refuse_qwen_variants(hf, "Qwen2")
    return {"qk_layernorm": False, "add_qkv_bias": True}


def units(shape: DecoderShape, hf: dict[str, Any]) -> list[Unit]:
    layers = [
        unit
        for layer in range(shape.num_layers)
        for unit in (
            *attention_units(shape, layer, qk_norm=False, qkv_bias=True),
            *mlp_units(shape, layer),
        )
    ]
    return [*embedding_units(shape), *layers]
