"""Llama 2 and 3.x (LlamaForCausalLM): no query/key norms; rope scaling 'llama3' as published."""

from typing import Any

from megatron_prefix.mcore.hf_map.checks import refuse_biases, rope_settings
from megatron_prefix.mcore.hf_map.layers import dense_units
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.mcore.hf_map.units import Unit

ARCHITECTURE = "LlamaForCausalLM"
# Megatron-Core's RotaryEmbedding has these three built in; only the factor is an argument.
BUILT_IN = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def transformer_settings(shape: DecoderShape, hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields beyond the shared sizes; ValueError for an unsupported variant."""
    refuse_biases(hf, "Llama", "attention_bias", "mlp_bias")
    rope_scaling_factor(hf)
    return {"qk_layernorm": False}


def rope_scaling_factor(hf: dict[str, Any]) -> float:
    """The 'llama3' rope factor, 0.0 for plain rope; ValueError for another scaling."""
    kind, rope = rope_settings(hf)
    if kind == "default":
        return 0.0
    if kind != "llama3":
        raise ValueError(f"rope_type={kind!r}: Llama is supported with 'default' or 'llama3'")
    for name, value in BUILT_IN.items():
        if rope[name] != value:
            raise ValueError(f"rope {name}={rope[name]}: Megatron-Core has {value} built in")
    return float(rope["factor"])


def units(shape: DecoderShape, hf: dict[str, Any]) -> list[Unit]:
    return dense_units(shape, qk_norm=False, qkv_bias=False)
