"""Norm and core attention for machines without Transformer Engine.

Megatron-Core's own local modules refuse packed sequences and sequence parallelism. These take the
very batch that Transformer Engine takes: THD, T packed tokens with ``cu_seqlens``.
Legend: T packed tokens, B sequences, S the longest of them, h heads, d head size.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from megatron_prefix.context_shares import within_sequences, zigzag


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
        self,
        config: TransformerConfig,
        *_: Any,
        pg_collection: ProcessGroupCollection,
        softmax_scale: float | None = None,
        **__: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale, self._context = softmax_scale, pg_collection.cp

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
        pack = Pack(
            packed_seq_params.cu_seqlens_q,
            int(packed_seq_params.max_seqlen_q),
            len(query) * self._context.size(),
        )
        if self._context.size() > 1:
            return self._attend_across(query, key, value, pack)
        q, k, v = (pack.unpack(t).transpose(1, 2) for t in (query, key, value))
        # Right padding is masked by causality alone: no real query sees a padded key.
        out = self.attend(q, k, v)
        return pack.repack(out.transpose(1, 2).flatten(2))

    def _attend_across(self, query: Tensor, key: Tensor, value: Tensor, pack: "Pack") -> Tensor:
        """query [T / C, h, d], key and value [T / C, groups, d] -> [T / C, h * d]: this rank's
        queries on the keys of all C context-parallel ranks."""
        ranks = self._context.size()
        shares = zigzag(pack.starts, ranks)
        back = shares.flatten().argsort()
        key, value = (
            gather_from_sequence_parallel_region(t, group=self._context)[back] for t in (key, value)
        )
        own = Pack(pack.starts // ranks, pack.longest // ranks, pack.tokens // ranks)
        positions = within_sequences(pack.starts)[shares[self._context.rank()]]
        # [B, 1, S / C, S]: a query sees its own sequence's keys up to itself.
        steps = torch.arange(pack.longest, device=positions.device)
        seen = steps <= own.unpack(positions)[:, None, :, None]
        q = own.unpack(query).transpose(1, 2)
        k, v = (pack.unpack(t).transpose(1, 2) for t in (key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=seen,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return own.repack(out.transpose(1, 2).flatten(2))

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


@dataclass(frozen=True)
class Pack:
    """How the sequences of a pack lie in it; lengths are the host's."""

    starts: Tensor  # int32 [B + 1]
    longest: int  # S
    tokens: int  # T

    def unpack(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...], something finite where a sequence has ended."""
        if self._even:
            return packed.unflatten(0, (len(self.starts) - 1, self.longest))
        index = self.starts[:-1, None].long() + self._steps
        return packed[torch.where(index < self.starts[1:, None], index, 0)]

    def repack(self, padded: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]."""
        if self._even:
            return padded.flatten(0, 1)
        return padded[self._steps < self.starts.diff()[:, None]]

    @property
    def _even(self) -> bool:
        return (len(self.starts) - 1) * self.longest == self.tokens

    @property
    def _steps(self) -> Tensor:
        return torch.arange(self.longest, device=self.starts.device)


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
