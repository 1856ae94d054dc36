"""Multi-head latent attention (MLA) as DeepSeek-V2 and -V3 have it: queries, keys and values come
out of low-rank latents, and one rotary key is shared by all heads (arXiv 2405.04434, section 2.1).

Legend: H hidden size, n heads, c_q and c_kv the ranks of the latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_prefix.mcore.hf_map.checks import refuse_biases, rope_settings
from megatron_prefix.mcore.hf_map.layers import (
    GATE_UP_DOWN,
    embedding_units,
    mlp_units,
    moe_units,
    norm_unit,
)
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.mcore.hf_map.units import Unit

LATENT_NORM_EPS = 1e-6  # DeepSeek's norms of the latents have it built in, whatever rms_norm_eps is
YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0}


@dataclass(frozen=True)
class LatentShape:
    """The widths of an MLA layer."""

    q_rank: int  # 0: queries are projected straight from the hidden state
    kv_rank: int
    nope: int  # of a query's and a key's head, without position
    rope: int  # of them, rotated; of keys, one for all heads
    value: int

    @classmethod
    def from_config(cls, hf: Mapping[str, Any]) -> "LatentShape":
        return cls(
            q_rank=hf.get("q_lora_rank") or 0,
            kv_rank=hf["kv_lora_rank"],
            nope=hf["qk_nope_head_dim"],
            rope=hf["qk_rope_head_dim"],
            value=hf["v_head_dim"],
        )


def latent_settings(shape: DecoderShape, hf: Mapping[str, Any], family: str) -> dict[str, Any]:
    """MLATransformerConfig fields; ValueError for a variant that Megatron-Core lacks."""
    latent = LatentShape.from_config(hf)
    refuse_biases(hf, family, "attention_bias", "mlp_bias")
    if shape.rms_norm_eps != LATENT_NORM_EPS:
        raise ValueError(
            f"rms_norm_eps={shape.rms_norm_eps}: {family} is supported with {LATENT_NORM_EPS}, "
            "which its norms of the latents have built in"
        )
    if hf.get("rope_interleave") is False:
        raise ValueError(f"rope_interleave=false: {family} is supported with interleaved pairs")
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": latent.q_rank or None,
        "kv_lora_rank": latent.kv_rank,
        "qk_head_dim": latent.nope,
        "qk_pos_emb_head_dim": latent.rope,
        "v_head_dim": latent.value,
        "rotary_base": shape.rope_theta,
        **_rotary(hf, family),
    }


def _rotary(hf: Mapping[str, Any], family: str) -> dict[str, Any]:
    """YaRN (arXiv 2309.00071) with DeepSeek's two scales of the attention, or plain rope."""
    kind, rope = rope_settings(hf)
    if kind == "default":
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    if kind != "yarn":
        raise ValueError(f"rope_type={kind!r}: {family} is supported with 'default' or 'yarn'")
    for name in ("attention_factor", "truncate"):
        if name in rope and rope[name] not in (None, True):
            raise ValueError(f"rope {name}={rope[name]}: {family} is supported without it")
    mscale, all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    if all_dim and not mscale:
        raise ValueError(f"rope mscale_all_dim={all_dim} needs mscale beside it")
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(rope["factor"]),
        "original_max_position_embeddings": rope["original_max_position_embeddings"],
        # Without the second scale the first is not read, and counts as 1.
        "mscale": float(mscale) if all_dim else 1.0,
        "mscale_all_dim": float(all_dim),
        **{name: float(rope.get(name) or value) for name, value in YARN_DEFAULTS.items()},
    }


def latent_units(shape: DecoderShape, hf: Mapping[str, Any], layer: int) -> list[Unit]:
    """The norm before the attention, and the attention. Down-projections are whole on every
    tensor-parallel rank; what they feed is sharded by heads."""
    latent, heads = LatentShape.from_config(hf), shape.num_attention_heads
    megatron, source = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    hidden, query = shape.hidden_size, heads * (latent.nope + latent.rope)

    def linear(name: str, source_name: str, rows: int, columns: int, axis: int = -1) -> Unit:
        return Unit(
            f"{megatron}self_attention.{name}.weight",
            (f"{source}self_attn.{source_name}.weight",),
            ((rows, columns),),
            layer,
            shard_axis=axis,
        )

    def norm(name: str, source_name: str, size: int) -> Unit:
        return norm_unit(f"{megatron}{name}", f"{source}{source_name}", size, layer)

    down = linear("linear_kv_down_proj", "kv_a_proj_with_mqa", latent.kv_rank + latent.rope, hidden)
    units = [norm("input_layernorm", "input_layernorm", hidden)]
    if latent.q_rank:
        units += [
            linear("linear_q_down_proj", "q_a_proj", latent.q_rank, hidden),
            replace(down, with_previous=True),
            norm("self_attention.q_layernorm", "self_attn.q_a_layernorm", latent.q_rank),
            linear("linear_q_up_proj", "q_b_proj", query, latent.q_rank, 0),
        ]
    else:
        units += [linear("linear_q_proj", "q_proj", query, hidden, 0), down]
    keys_and_values = heads * (latent.nope + latent.value)
    return [
        *units,
        norm("self_attention.kv_layernorm", "self_attn.kv_a_layernorm", latent.kv_rank),
        linear("linear_kv_up_proj", "kv_b_proj", keys_and_values, latent.kv_rank, 0),
        linear("linear_proj", "o_proj", hidden, heads * latent.value, 1),
    ]


def decoder_units(shape: DecoderShape, hf: Mapping[str, Any], *, expert_bias: bool) -> list[Unit]:
    """Every unit of a DeepSeek decoder: its first layers are dense, the others have experts."""
    units = embedding_units(shape)
    for layer in range(shape.num_layers):
        units += latent_units(shape, hf, layer)
        if layer in shape.sparse_layers:
            units += moe_units(
                shape, layer, block="mlp", parts=GATE_UP_DOWN, expert_bias=expert_bias
            )
        else:
            units += mlp_units(shape, layer)
    return units
