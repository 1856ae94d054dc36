"""DeepSeek-V2's router, which Megatron-Core's group-limited one is not: a group counts by its one
best expert (arXiv 2405.04434, section 2.2.2), where Megatron sums several."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class GroupLimitedRouter(TopKRouter):
    """Softmax over all experts, then the best of the ``moe_router_group_topk`` best groups."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [T, 1, experts] -> weights [T, experts], zero where not chosen, and the choice."""
        assert padding_mask is None, "a pack has no padding"
        config, experts = self.config, self.config.num_moe_experts
        assert experts is not None and config.moe_router_num_groups is not None
        scores = logits.view(-1, experts).softmax(dim=-1, dtype=torch.float32)
        by_group = scores.unflatten(1, (config.moe_router_num_groups, -1))
        best = by_group.amax(dim=-1).topk(config.moe_router_group_topk, dim=-1).indices
        others = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(1, best, False)
        limited = by_group.masked_fill(others[..., None], 0.0).flatten(1)
        weights, chosen = limited.topk(self.topk, dim=-1)
        weights = (weights * (config.moe_router_topk_scaling_factor or 1.0)).type_as(logits)
        empty = torch.zeros_like(limited, dtype=logits.dtype)
        return empty.scatter(1, chosen, weights), empty.bool().scatter(1, chosen, True)


def use_group_router(spec: Any, config: TransformerConfig) -> None:
    """Put it into the layers with experts of a block's spec, where the model's router is V2's."""
    if not (config.moe_router_num_groups and config.moe_router_score_function == "softmax"):
        return
    for layer in spec.layer_specs:
        mlp = layer.submodules.mlp
        if isinstance(mlp, partial) and mlp.func is MoELayer:
            submodules = replace(mlp.keywords["submodules"], router=GroupLimitedRouter)
            layer.submodules.mlp = partial(MoELayer, submodules=submodules)
