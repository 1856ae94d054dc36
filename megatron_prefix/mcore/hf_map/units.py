"""What a family file says: how Hugging Face tensors become Megatron-Core parameters, and back.

A :class:`Unit` is one Megatron parameter at tensor parallel 1 and the Hugging Face tensors that
make it. Families differ in configuration and in which units a layer has; packing is shared here.
Legend: g key-value groups, q query heads a group, d head size, H hidden size, F ffn size.
An expert's parameters are units of their own, "decoder.layers.3.mlp.experts.7.linear_fc1.weight",
however Megatron groups them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
Pack = Callable[[Sequence[Tensor]], Tensor]
Unpack = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Unit:
    """One whole Megatron parameter by its global name, "decoder.layers.3.mlp.linear_fc1.weight"."""

    megatron_name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layer: int  # -1: before the first layer; num_layers: after the last
    expert: int = -1  # its number in the layer; -1: no expert's
    shard_axis: int = -1  # the tensor-parallel axis; -1: replicated
    blocks: int = 1  # parts along shard_axis that are sharded one by one (gate and up: 2)
    # Each Hugging Face tensor holds those of so many experts along a first axis, which hf_shapes
    # leave out: this unit's is the one at ``expert``. 0: the tensors are this unit's alone.
    stacked: int = 0
    # Whatever the model's precision: a buffer of a router, which no optimizer moves.
    fp32_buffer: bool = False
    # Travels to servers in the bucket of the unit before it: SGLang joins the two, and drops one
    # that comes alone.
    with_previous: bool = False
    pack: Pack = lambda tensors: tensors[0]
    unpack: Unpack = lambda tensor: (tensor,)
    turned: bool = False  # packing transposes the one tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's: packing joins rows."""
        if self.turned:
            return self.hf_shapes[0][::-1]
        return sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:]

    @property
    def whole_hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the tensors as they lie in a folder."""
        if not self.stacked:
            return self.hf_shapes
        return tuple((self.stacked, *shape) for shape in self.hf_shapes)


def hf_tensors(units: Iterable[Unit]) -> dict[str, tuple[int, ...]]:
    """The shape of every Hugging Face tensor of ``units``, by name; those of several once."""
    return {
        name: shape
        for unit in units
        for name, shape in zip(unit.hf_names, unit.whole_hf_shapes, strict=True)
    }


def joined(parts: Iterable[tuple[Unit, str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors out of the units': those of stacked units when the last one has come.

    The units of one stack follow each other, in any order.
    """
    stack: dict[int, Tensor] = {}
    for unit, name, tensor in parts:
        if not unit.stacked:
            yield name, tensor
            continue
        stack[unit.expert] = tensor
        if len(stack) == unit.stacked:
            yield name, torch.stack([stack[expert] for expert in range(unit.stacked)])
            stack.clear()
    assert not stack, "a stack of experts has been left"


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


def norm_unit(megatron: str, hf: str, size: int, layer: int) -> Unit:
    return Unit(f"{megatron}.weight", (f"{hf}.weight",), ((size,),), layer)
