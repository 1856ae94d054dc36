"""Qwen3 dense (Qwen3ForCausalLM): RMS norms on queries and keys, no biases."""

from typing import Any

from megatron_prefix.mcore.hf_map.units import (
    DenseShape,
    Unit,
    attention_units,
    embedding_units,
    mlp_units,
)

ARCHITECTURE = "Qwen3ForCausalLM"


def transformer_settings(hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields beyond the shared sizes; ValueError for an unsupported variant."""
    if hf.get("use_sliding_window"):
        raise ValueError(
            "use_sliding_window=true: Qwen3 with sliding-window attention is not supported; "
            "use a checkpoint with full attention"
        )
    if (kind := (hf.get("rope_parameters") or {}).get("rope_type", "default")) != "default":
        raise ValueError(f"rope_type={kind!r}: Qwen3 is supported with rope_type 'default' only")
    if hf.get("attention_bias"):
        raise ValueError("attention_bias=true: Qwen3 with attention biases is not supported")
    return {"qk_layernorm": True}


def units(shape: DenseShape, hf: dict[str, Any]) -> list[Unit]:
    layers = [
        unit
        for layer in range(shape.num_layers)
        for unit in (
            *attention_units(shape, layer, qk_norm=True, qkv_bias=False),
            *mlp_units(shape, layer),
        )
    ]
    return [*embedding_units(shape), *layers]
