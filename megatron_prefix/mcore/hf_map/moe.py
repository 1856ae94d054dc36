"""What mixtures of experts share in Megatron's configuration."""

from typing import Any

from megatron_prefix.mcore.hf_map.units import DecoderShape


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
    }
