"""Norm and core attention for machines without Transformer Engine.

Megatron-Core's own local modules refuse packed sequences and sequence parallelism. These take the
very batch that Transformer Engine takes: THD, T packed tokens with ``cu_seqlens``.
Legend: T packed tokens, B sequences, S the longest of them, h heads, d head size.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root mean square norm whose weight takes part in sequence-parallel gradient sums."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> None:
        super().__init__()
        assert config.normalization == "RMSNorm", config.normalization
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads sums gradients of parameters so marked over tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class PackedAttention(nn.Module):
    """Causal attention within each packed sequence, through torch's fused kernel."""

    def __init__(
        self, config: TransformerConfig, *_: Any, softmax_scale: float | None = None, **__: Any
    ) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine"
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T, h, d], key and value [T, groups, d] -> [T, h * d]."""
        assert packed_seq_params is not None, "only packed (THD) batches are run"
        where = _padded_index(packed_seq_params)
        q, k, v = (_unpack(t, where).transpose(1, 2) for t in (query, key, value))
        # Right padding is masked by causality alone: no real query sees a padded key.
        out = self.attend(q, k, v)
        return _repack(out.transpose(1, 2).flatten(2), where, packed_seq_params)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, h, S, d], key and value [B, groups, S, d] -> [B, h, S, d]."""
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def _padded_index(params: PackedSeqParams) -> Tensor | tuple[int, int]:
    """[B, S] positions in the pack, 0 where a sequence has ended; (B, S) where none is shorter."""
    starts, length = params.cu_seqlens_q, int(params.max_seqlen_q)
    sequences, tokens = starts.numel() - 1, int(params.total_tokens)
    if sequences * length == tokens:
        return sequences, length
    steps = torch.arange(length, device=starts.device)
    index = starts[:-1, None].long() + steps
    return torch.where(index < starts[1:, None], index, 0)


def _unpack(packed: Tensor, where: Tensor | tuple[int, int]) -> Tensor:
    if isinstance(where, tuple):
        return packed.unflatten(0, where)
    return packed[where]


def _repack(padded: Tensor, where: Tensor | tuple[int, int], params: PackedSeqParams) -> Tensor:
    """[B, S, h * d] -> [T, h * d]."""
    if isinstance(where, tuple):
        return padded.flatten(0, 1)
    starts = params.cu_seqlens_q
    lengths = starts[1:] - starts[:-1]
    return padded[torch.arange(where.shape[1], device=starts.device) < lengths[:, None]]


def local_block_spec(
    config: TransformerConfig, pp_rank: int, core_attention: type[PackedAttention]
) -> TransformerBlockSubmodules:
    """Megatron's local decoder block of one pipeline stage, with the modules of this file."""
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", pp_rank=pp_rank
    )
    spec.layer_norm = RMSNorm
    for layer in spec.layer_specs:
        submodules = layer.submodules
        submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
        submodules.sharded_state_dict_keys_map = _checkpoint_keys(config, submodules.mlp)
        attention = submodules.self_attention.submodules
        attention.core_attention = core_attention
        for name in ("q_layernorm", "k_layernorm", "kv_layernorm"):
            if getattr(attention, name, IdentityOp) not in (IdentityOp, None):
                setattr(attention, name, RMSNorm)
    return spec


def _checkpoint_keys(config: TransformerConfig, mlp: Any) -> dict[str, str]:
    """Transformer Engine's names of norms, which are its linear layers' own (``dist_keys.py``)."""
    latent = config.multi_latent_attention
    names = ("q", "kv") if latent else ()
    keys = {
        f"self_attention.{x}_layernorm.": f"self_attention.linear_{x}_up_proj.layer_norm_"
        for x in names
    }
    if not latent:
        keys["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not (isinstance(mlp, partial) and mlp.func is MoELayer):
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return keys
