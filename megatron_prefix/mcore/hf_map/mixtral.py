"""Mixtral (MixtralForCausalLM): Llama's attention, experts in every layer."""

from typing import Any

from megatron_prefix.mcore.hf_map.checks import require_plain_rope
from megatron_prefix.mcore.hf_map.layers import attention_units, embedding_units, moe_units
from megatron_prefix.mcore.hf_map.moe import routing_settings
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.mcore.hf_map.units import Unit

ARCHITECTURE = "MixtralForCausalLM"


def transformer_settings(shape: DecoderShape, hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields beyond the shared sizes; ValueError for an unsupported variant."""
    require_plain_rope(hf, "Mixtral")
    if hf.get("sliding_window"):
        raise ValueError(
            f"sliding_window={hf['sliding_window']}: Mixtral is supported with full attention only"
        )
    if hf.get("router_jitter_noise"):
        raise ValueError(
            f"router_jitter_noise={hf['router_jitter_noise']}: set it to 0 in config.json; the "
            "server's router has none"
        )
    return {"qk_layernorm": False} | routing_settings(shape, hf, normalised=True)


def units(shape: DecoderShape, hf: dict[str, Any]) -> list[Unit]:
    units = embedding_units(shape)
    for layer in range(shape.num_layers):
        units += attention_units(shape, layer, qk_norm=False, qkv_bias=False)
        units += moe_units(shape, layer, block="block_sparse_moe", parts=("w1", "w3", "w2"))
    return units
