"""What mixtures of experts share in Megatron's configuration."""

from typing import Any

from megatron_prefix.mcore.hf_map.shape import DecoderShape


def routing_settings(
    shape: DecoderShape, hf: dict[str, Any], *, normalised: bool
) -> dict[str, Any]:
    """TransformerConfig fields of a softmax router.

    ``normalised``: the chosen experts' weights sum to one, which a softmax over their logits alone
    gives. No auxiliary loss: the divergence is the whole objective, and a student whose router
    were pushed elsewhere would no longer be the policy that samples.
    """
    return {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.moe_ffn_hidden_size,
        "moe_layer_freq": [int(i in shape.sparse_layers) for i in range(shape.num_layers)],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_router_pre_softmax": not normalised,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        # Hugging Face takes the softmax in fp32; Megatron then multiplies in fp32 as well.
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_shared_expert_intermediate_size": shape.shared_ffn_hidden_size or None,
    }


def grouped_routing(hf: dict[str, Any], family: str) -> dict[str, Any]:
    """TransformerConfig fields where a token's experts come out of ``topk_group`` of ``n_group``
    groups; {} where there is one group alone."""
    groups, chosen = hf.get("n_group") or 1, hf.get("topk_group") or 1
    if groups == 1:
        return {}
    if hf["n_routed_experts"] % groups or chosen > groups:
        raise ValueError(
            f"n_group={groups}, topk_group={chosen}: the {hf['n_routed_experts']} experts of a "
            f"{family} must divide into groups, and no more be chosen than there are"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
