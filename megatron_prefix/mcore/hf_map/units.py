"""What a family file says: how Hugging Face tensors become Megatron-Core parameters, and back.

A :class:`Unit` is one Megatron parameter at tensor parallel 1 and the Hugging Face tensors that
make it. Families differ in configuration and in which units a layer has; packing is shared here.
Legend: g key-value groups, q query heads a group, d head size, H hidden size, F ffn size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Pack = Callable[[Sequence[Tensor]], Tensor]
Unpack = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Unit:
    """One whole Megatron parameter by its global name, "decoder.layers.3.mlp.linear_fc1.weight"."""

    megatron_name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layer: int  # -1: before the first layer; num_layers: after the last
    shard_axis: int = -1  # the tensor-parallel axis; -1: replicated
    blocks: int = 1  # parts along shard_axis that are sharded one by one (gate and up: 2)
    pack: Pack = lambda tensors: tensors[0]
    unpack: Unpack = lambda tensor: (tensor,)


@dataclass(frozen=True)
class DenseShape:
    """The sizes of a dense decoder, from its config.json."""

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

    @classmethod
    def from_config(cls, hf: dict[str, Any]) -> "DenseShape":
        heads = hf["num_attention_heads"]
        rope = hf.get("rope_parameters") or {}
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
        )


def pack_qkv(shape: DenseShape) -> tuple[Pack, Unpack]:
    """Megatron interleaves by group: [q heads, k, v] of group 0, then of group 1, ..."""
    g, d = shape.num_query_groups, shape.kv_channels
    q = shape.num_attention_heads // g

    def pack(tensors: Sequence[Tensor]) -> Tensor:
        by_group = [t.view(g, -1, d, *t.shape[1:]) for t in tensors]
        return torch.cat(by_group, dim=1).flatten(0, 2)

    def unpack(tensor: Tensor) -> tuple[Tensor, ...]:
        by_group = tensor.view(g, q + 2, d, *tensor.shape[1:])
        return tuple(part.flatten(0, 2) for part in by_group.split([q, 1, 1], dim=1))

    return pack, unpack


def embedding_units(shape: DenseShape) -> list[Unit]:
    """The embedding, the last norm and, unless tied, the LM head."""
    table = (shape.vocab_size, shape.hidden_size)
    first, last = -1, shape.num_layers
    units = [
        Unit(
            "embedding.word_embeddings.weight",
            ("model.embed_tokens.weight",),
            (table,),
            first,
            shard_axis=0,
        ),
        Unit(
            "decoder.final_layernorm.weight",
            ("model.norm.weight",),
            ((shape.hidden_size,),),
            last,
        ),
    ]
    if not shape.tied:
        units.append(Unit("output_layer.weight", ("lm_head.weight",), (table,), last, shard_axis=0))
    return units


def attention_units(shape: DenseShape, layer: int, *, qk_norm: bool, qkv_bias: bool) -> list[Unit]:
    hf, megatron = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    d, hidden = shape.kv_channels, shape.hidden_size
    rows = [n * d for n in (shape.num_attention_heads, *[shape.num_query_groups] * 2)]
    pack, unpack = pack_qkv(shape)

    def qkv(kind: str, tail: tuple[int, ...]) -> Unit:
        return Unit(
            f"{megatron}self_attention.linear_qkv.{kind}",
            tuple(f"{hf}self_attn.{part}_proj.{kind}" for part in "qkv"),
            tuple((n, *tail) for n in rows),
            layer,
            shard_axis=0,
            pack=pack,
            unpack=unpack,
        )

    units = [
        _norm(f"{megatron}input_layernorm", f"{hf}input_layernorm", hidden, layer),
        qkv("weight", (hidden,)),
        Unit(
            f"{megatron}self_attention.linear_proj.weight",
            (f"{hf}self_attn.o_proj.weight",),
            ((hidden, rows[0]),),
            layer,
            shard_axis=1,
        ),
    ]
    if qkv_bias:
        units.append(qkv("bias", ()))
    if qk_norm:
        units += [
            _norm(f"{megatron}self_attention.{n}_layernorm", f"{hf}self_attn.{n}_norm", d, layer)
            for n in "qk"
        ]
    return units


def mlp_units(shape: DenseShape, layer: int) -> list[Unit]:
    """The gated feed-forward: gate over up in linear_fc1, each half sharded on its own."""
    hf, megatron = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    return [
        _norm(f"{megatron}pre_mlp_layernorm", f"{hf}post_attention_layernorm", hidden, layer),
        Unit(
            f"{megatron}mlp.linear_fc1.weight",
            (f"{hf}mlp.gate_proj.weight", f"{hf}mlp.up_proj.weight"),
            ((ffn, hidden),) * 2,
            layer,
            shard_axis=0,
            blocks=2,
            pack=lambda tensors: torch.cat(list(tensors)),
            unpack=lambda tensor: tuple(tensor.chunk(2)),
        ),
        Unit(
            f"{megatron}mlp.linear_fc2.weight",
            (f"{hf}mlp.down_proj.weight",),
            ((hidden, ffn),),
            layer,
            shard_axis=1,
        ),
    ]


def _norm(megatron: str, hf: str, size: int, layer: int) -> Unit:
    return Unit(f"{megatron}.weight", (f"{hf}.weight",), ((size,),), layer)
