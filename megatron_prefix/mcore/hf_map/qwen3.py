"""Qwen3 dense (Qwen3ForCausalLM): RMS norms on queries and keys, no biases."""

from typing import Any

from megatron_prefix.mcore.hf_map.checks import refuse_biases, refuse_qwen_variants
from megatron_prefix.mcore.hf_map.units import (
    DecoderShape,
    Unit,
    attention_units,
    embedding_units,
    mlp_units,
)

ARCHITECTURE = "Qwen3ForCausalLM"


def transformer_settings(shape: DecoderShape, hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields beyond the shared sizes; ValueError for an unsupported variant."""
    refuse_qwen_variants(hf, "Qwen3")
    refuse_biases(hf, "Qwen3", "attention_bias")
    return {"qk_layernorm": True}


def units(shape: DecoderShape, hf: dict[str, Any]) -> list[Unit]:
    layers = [
        unit
        for layer in range(shape.num_layers)
        for unit in (
            *attention_units(shape, layer, qk_norm=True, qkv_bias=False),
            *mlp_units(shape, layer),
        )
    ]
    return [*embedding_units(shape), *layers]
