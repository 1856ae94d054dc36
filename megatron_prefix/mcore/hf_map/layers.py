"""The units of a decoder's layers that several families share, and how their tensors are packed.

Legend: g key-value groups, q query heads a group, d head size, H hidden size, F ffn size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.mcore.hf_map.units import Pack, Unit, Unpack

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")


def dense_units(shape: DecoderShape, *, qk_norm: bool, qkv_bias: bool) -> list[Unit]:
    """Every unit of a dense decoder."""
    units = embedding_units(shape)
    for layer in range(shape.num_layers):
        units += attention_units(shape, layer, qk_norm=qk_norm, qkv_bias=qkv_bias)
        units += mlp_units(shape, layer)
    return units


def embedding_units(shape: DecoderShape) -> list[Unit]:
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


def attention_units(
    shape: DecoderShape, layer: int, *, qk_norm: bool, qkv_bias: bool
) -> list[Unit]:
    """A layer's grouped-query attention, with the norm before it."""
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
        norm_unit(f"{megatron}input_layernorm", f"{hf}input_layernorm", hidden, layer),
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
            norm_unit(
                f"{megatron}self_attention.{n}_layernorm", f"{hf}self_attn.{n}_norm", d, layer
            )
            for n in "qk"
        ]
    return units


def pack_qkv(shape: DecoderShape) -> tuple[Pack, Unpack]:
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


def mlp_units(shape: DecoderShape, layer: int) -> list[Unit]:
    """The gated feed-forward: gate over up in linear_fc1, each half sharded on its own."""
    sizes = (shape.ffn_hidden_size, shape.hidden_size)
    hf, megatron = f"model.layers.{layer}.mlp.", f"decoder.layers.{layer}.mlp."
    return [mlp_norm(shape, layer), *_gated(megatron, hf, GATE_UP_DOWN, sizes, layer)]


def moe_units(
    shape: DecoderShape,
    layer: int,
    *,
    block: str,
    parts: tuple[str, str, str],
    expert_bias: bool = False,
) -> list[Unit]:
    """Router, experts and, where the model has them, shared experts. ``block`` is the layer's name
    for them ("mlp"), ``parts`` an expert's names of gate, up and down; ``expert_bias``: the router
    adds one to its scores when it chooses."""
    hf, megatron = f"model.layers.{layer}.{block}.", f"decoder.layers.{layer}.mlp."
    sizes = (shape.moe_ffn_hidden_size, shape.hidden_size)
    router = Unit(
        f"{megatron}router.weight",
        (f"{hf}gate.weight",),
        ((shape.num_experts, shape.hidden_size),),
        layer,
    )
    experts = [
        unit
        for e in range(shape.num_experts)
        for unit in _gated(f"{megatron}experts.{e}.", f"{hf}experts.{e}.", parts, sizes, layer, e)
    ]
    units = [mlp_norm(shape, layer), router, *experts]
    if expert_bias:
        name = f"{hf}gate.e_score_correction_bias"
        size = (shape.num_experts,)
        units.append(
            Unit(f"{megatron}router.expert_bias", (name,), (size,), layer, fp32_buffer=True)
        )
    if shape.shared_ffn_hidden_size:
        sizes = (shape.shared_ffn_hidden_size, shape.hidden_size)
        units += _gated(f"{megatron}shared_experts.", f"{hf}shared_experts.", parts, sizes, layer)
    return units


def mlp_norm(shape: DecoderShape, layer: int) -> Unit:
    return norm_unit(
        f"decoder.layers.{layer}.pre_mlp_layernorm",
        f"model.layers.{layer}.post_attention_layernorm",
        shape.hidden_size,
        layer,
    )


def _gated(
    megatron: str,
    hf: str,
    parts: tuple[str, str, str],
    sizes: tuple[int, int],
    layer: int,
    expert: int = -1,
) -> list[Unit]:
    (gate, up, down), (ffn, hidden) = parts, sizes
    return [
        Unit(
            f"{megatron}linear_fc1.weight",
            (f"{hf}{gate}.weight", f"{hf}{up}.weight"),
            ((ffn, hidden),) * 2,
            layer,
            expert,
            shard_axis=0,
            blocks=2,
            pack=join_rows,
            unpack=lambda tensor: tuple(tensor.chunk(2)),
        ),
        Unit(
            f"{megatron}linear_fc2.weight",
            (f"{hf}{down}.weight",),
            ((hidden, ffn),),
            layer,
            expert,
            shard_axis=1,
        ),
    ]


def join_rows(tensors: Sequence[Tensor]) -> Tensor:
    """One above the other: where they lie so in memory already, a view of it."""
    first, end = tensors[0], tensors[0].data_ptr()
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        here = tensor.untyped_storage().data_ptr() == storage and tensor.data_ptr() == end
        if not here or tensor.dtype != first.dtype or not tensor.is_contiguous():
            return torch.cat(list(tensors))
        end += tensor.nbytes
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def norm_unit(megatron: str, hf: str, size: int, layer: int) -> Unit:
    return Unit(f"{megatron}.weight", (f"{hf}.weight",), ((size,),), layer)
