"""DeepSeek's latent attention in Megatron-Core's blocks, on either kind of machine.

Legend: T packed tokens (a tensor-parallel share of them under sequence parallelism), c_kv the
rank of the key-value latent, r the width of the rotary key.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn

from megatron_prefix.context_shares import within_sequences
from megatron_prefix.mcore.local_rotary import PackedRotaryEmbedding


class LatentAttention(MLASelfAttention):
    """Megatron's, for models without a query latent too (V2-Lite): these have no norm there, and
    Megatron builds their projection in the global group, which is no model's."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        if self.config.q_lora_rank is not None:
            return super()._resolve_qk_norm_config(submodules)
        group = {"tp_group": self.pg_collection.tp}
        return {
            "linear_q_proj": ModuleSpec(module=submodules.linear_q_proj, params=group),
            "linear_q_up_proj": IdentityOp,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": IdentityOp,
            "kv_layernorm": submodules.kv_layernorm,
        }


class LocalLatentAttention(LatentAttention):
    """Without Transformer Engine: down-projections whole on every rank, as its are.

    Megatron's local ones are cut over tensor-parallel ranks, gathered in the global group, and lose
    the other ranks' part of the rotary key's gradient.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        width = self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim
        self.linear_kv_down_proj = WholeLinear(self.config, width)
        if self.config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(self.config, self.config.q_lora_rank)
        yarn = self.config.rope_type == "yarn"
        # Rebinding the class keeps what Megatron computed.
        self.rotary_pos_emb.__class__ = PackedYarnRotaryEmbedding if yarn else PackedRotaryEmbedding

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Any:
        # Its angles are made within the layer, which a pipeline's stage may compute again for this
        # microbatch after it began the next: the positions are the pack's own, not the last one's.
        if packed_seq_params is not None:
            positions = within_sequences(packed_seq_params.cu_seqlens_q)
            self.rotary_pos_emb.position_ids = positions
        return super().forward(hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs)

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        query, keys = super()._qkv_down_projection(hidden_states)
        if self.config.sequence_parallel:  # Megatron gathers the rotary key and sums its gradient
            return query, keys
        sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        latent, rotary = keys.split(sizes, dim=-1)
        rotary = copy_to_tensor_model_parallel_region(rotary, group=self.pg_collection.tp)
        return query, torch.cat([latent, rotary], dim=-1)


class WholeLinear(nn.Module):
    """[T, 1, hidden_size] -> [T, 1, width], the same weight on every tensor-parallel rank."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__()
        weight = torch.empty(width, config.hidden_size, dtype=config.params_dtype)
        self.weight = nn.Parameter(weight)
        # finalize_model_grads sums gradients of parameters so marked over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class PackedYarnRotaryEmbedding(YarnRotaryEmbedding):
    """As PackedRotaryEmbedding, with YaRN's frequencies and its scale."""

    position_ids: Tensor | None = None

    def forward(
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> tuple[Tensor, float]:
        angles, scale = self.get_emb(max_seq_len, offset)
        if not packed_seq:
            return angles, scale
        assert self.position_ids is not None, "position_ids were not set before a packed forward"
        return angles[self.position_ids], scale


def use_latent_attention(spec: Any, *, local: bool) -> None:
    """Put the classes of this file into a block's spec whose layers have Megatron's.

    The keys of a checkpoint are those of Transformer Engine's modules, on either machine.
    """
    for layer in spec.layer_specs:
        layer.submodules.self_attention.module = LocalLatentAttention if local else LatentAttention
