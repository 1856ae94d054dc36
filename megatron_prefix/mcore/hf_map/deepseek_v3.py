"""DeepSeek-V3 and R1 (DeepseekV3ForCausalLM): latent attention, a sigmoid router with a bias per
expert that chooses within groups, shared experts, dense first layers (arXiv 2412.19437)."""

from typing import Any

from megatron_prefix.mcore.hf_map.checks import require_published
from megatron_prefix.mcore.hf_map.latent import decoder_units, latent_settings
from megatron_prefix.mcore.hf_map.moe import grouped_routing, routing_settings
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.mcore.hf_map.units import Unit

ARCHITECTURE = "DeepseekV3ForCausalLM"
PUBLISHED = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
}


def transformer_settings(shape: DecoderShape, hf: dict[str, Any]) -> dict[str, Any]:
    """TransformerConfig fields beyond the shared sizes; ValueError for an unsupported variant."""
    require_published(hf, "DeepSeek-V3", **PUBLISHED)
    groups = grouped_routing(hf, "DeepSeek-V3")
    # Megatron-Core sums as many scores of a group as are chosen from each; DeepSeek always two.
    if groups and hf["num_experts_per_tok"] // hf["topk_group"] != 2:
        raise ValueError(
            f"num_experts_per_tok={hf['num_experts_per_tok']} with topk_group={hf['topk_group']}: "
            "DeepSeek-V3 is supported with two experts a chosen group"
        )
    return (
        latent_settings(shape, hf, "DeepSeek-V3")
        | routing_settings(shape, hf, normalised=True)
        | groups
        | {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": float(hf.get("routed_scaling_factor", 1.0)),
        }
    )


def units(shape: DecoderShape, hf: dict[str, Any]) -> list[Unit]:
    return decoder_units(shape, hf, expert_bias=True)
