"""DeepSeek-V2 and V2-Lite (DeepseekV2ForCausalLM): latent attention, a softmax router, in the large
model limited to the groups of the best experts, shared experts, dense first layers."""

from typing import Any

from megatron_prefix.mcore.hf_map.checks import require_published
from megatron_prefix.mcore.hf_map.latent import decoder_units, latent_settings
from megatron_prefix.mcore.hf_map.moe import grouped_routing, routing_settings
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.mcore.hf_map.units import Unit

ARCHITECTURE = "DeepseekV2ForCausalLM"
METHODS = ("greedy", "group_limited_greedy")
PUBLISHED = {"scoring_func": "softmax", "norm_topk_prob": False, "moe_layer_freq": 1}


def transformer_settings(shape: DecoderShape, hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields beyond the shared sizes; ValueError for an unsupported variant."""
    require_published(hf, "DeepSeek-V2", **PUBLISHED)
    method = hf.get("topk_method", "greedy")
    if method not in METHODS:
        raise ValueError(
            f"topk_method={method!r}: DeepSeek-V2 is supported with {', '.join(METHODS)}"
        )
    limited = method == "group_limited_greedy"
    return (
        latent_settings(shape, hf, "DeepSeek-V2")
        | routing_settings(shape, hf, normalised=False)
        | (grouped_routing(hf, "DeepSeek-V2") if limited else {})
        | {"moe_router_topk_scaling_factor": float(hf.get("routed_scaling_factor", 1.0))}
    )


def units(shape: DecoderShape, hf: dict[str, Any]) -> list[Unit]:
    return decoder_units(shape, hf, expert_bias=False)
