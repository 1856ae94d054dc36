"""The sizes of a decoder, of any family, by its config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder, from its config.json."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    tied: bool
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    num_experts: int = 0  # of a sparse layer; 0: the model is dense
    moe_ffn_hidden_size: int = 0  # of one expert
    sparse_layers: tuple[int, ...] = ()  # the layers that have experts
    shared_ffn_hidden_size: int = 0  # of a sparse layer's shared experts together; 0: none

    @classmethod
    def from_config(cls, hf: dict[str, Any]) -> "DecoderShape":
        """Out of a config.json; KeyError names a size that it lacks."""
        heads = hf["num_attention_heads"]
        rope = hf.get("rope_parameters") or {}
        experts = num_experts(hf)
        return cls(
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_hidden_size=hf["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=hf.get("num_key_value_heads") or heads,
            kv_channels=hf.get("head_dim") or hf["hidden_size"] // heads,
            vocab_size=hf["vocab_size"],
            tied=bool(hf.get("tie_word_embeddings", False)),
            rms_norm_eps=hf["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
            max_position_embeddings=hf["max_position_embeddings"],
            num_experts=experts,
            moe_ffn_hidden_size=_expert_width(hf) if experts else 0,
            sparse_layers=sparse_layers(hf),
            shared_ffn_hidden_size=(hf.get("n_shared_experts") or 0) * _expert_width(hf),
        )


def num_experts(hf: Mapping[str, Any]) -> int:
    """Experts of a sparse layer by config.json; 0 for a dense model."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((int(hf[name]) for name in names if hf.get(name)), 0)


def sparse_layers(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers with experts: every one, every n-th, all but some (Qwen3-MoE's config) or all but
    the first (DeepSeek's)."""
    if not num_experts(hf):
        return ()
    dense = hf.get("mlp_only_layers") or range(hf.get("first_k_dense_replace") or 0)
    every = hf.get("decoder_sparse_step") or 1
    layers = range(hf["num_hidden_layers"])
    return tuple(i for i in layers if i not in dense and (i + 1) % every == 0)


def _expert_width(hf: Mapping[str, Any]) -> int:
    return int(hf.get("moe_intermediate_size") or hf["intermediate_size"])
