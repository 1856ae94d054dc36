"""Moves weights between Hugging Face tensors and a model's tensor- and pipeline-parallel shards."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.mcore.dist_keys import VOCABULARY
from megatron_prefix.mcore.hf_map import HfModel
from megatron_prefix.mcore.hf_map.units import Unit, joined
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.tensor_files import HfReader

# Transformer Engine fuses a norm into the linear layer behind it and names its weight there.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
}
# An expert's parameter as SequentialMLP names it, and as Transformer Engine's grouped linear does.
LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(?P<index>\d+)\.(?P<name>.+)")
GROUPED_EXPERT = re.compile(r"mlp\.experts\.(?P<name>linear_fc[12]\.(weight|bias))(?P<index>\d+)")


def shard(full: Tensor, unit: Unit, tp: int, rank: int) -> Tensor:
    """Rank ``rank``'s part of a whole parameter; each of its blocks is split on its own."""
    if tp == 1 or unit.shard_axis < 0:
        return full
    axis = unit.shard_axis
    parts = [block.chunk(tp, axis)[rank] for block in full.chunk(unit.blocks, axis)]
    return torch.cat(parts, axis) if len(parts) > 1 else parts[0]


def unshard(shards: Sequence[Tensor], unit: Unit) -> Tensor:
    """The inverse of :func:`shard` over all ranks."""
    if len(shards) == 1 or unit.shard_axis < 0:
        return shards[0]
    blocks = [part.chunk(unit.blocks, unit.shard_axis) for part in shards]
    ordered = [rank[block] for block in range(unit.blocks) for rank in blocks]
    return torch.cat(ordered, unit.shard_axis)


def named_units(model: MegatronModel) -> Iterator[tuple[Unit, Tensor]]:
    """This rank's parameters, and routers' biases, with the units they are shards of."""
    units = {unit.megatron_name: unit for unit in model.hf.units}
    for local_name, buffer in model.module.named_buffers():
        name = global_name(model, local_name)
        if name in units:
            yield units[name], buffer
    for local_name, param in model.module.named_parameters():
        name = global_name(model, local_name)
        if name == "output_layer.weight" and name not in units:
            name = "embedding.word_embeddings.weight"  # a tied head on another stage: its own copy
        yield units[name], param


def global_name(model: MegatronModel, local_name: str) -> str:
    """A parameter's name with the layer counted over all stages, experts over all ranks that share
    them, and norms by their own names."""
    parts = local_name.split(".", 3)
    if parts[:2] != ["decoder", "layers"]:
        return local_name
    layer = model.module.decoder.layers[int(parts[2])].layer_number - 1
    tail = FUSED_NORMS.get(parts[3], parts[3])
    expert = LOCAL_EXPERT.fullmatch(tail) or GROUPED_EXPERT.fullmatch(tail)
    if expert:
        first = model.groups.ep_rank * local_experts(model)
        tail = f"mlp.experts.{first + int(expert['index'])}.{expert['name']}"
    return f"decoder.layers.{layer}.{tail}"


def local_experts(model: MegatronModel) -> int:
    """Experts of a sparse layer that one expert-parallel rank holds."""
    return model.hf.shape.num_experts // model.groups.layout.ep


@torch.no_grad()
def load_hf_weights(model: MegatronModel) -> None:
    """Fill this rank's shards from the Hugging Face folder, one unit in memory at a time."""
    reader = HfReader(model.hf.path)
    groups, tp_rank = model.groups, model.groups.tp_rank
    for unit, param in named_units(model):
        if unit.megatron_name in VOCABULARY:
            weight = vocab_rows(reader, unit.hf_names[0], model.vocab_rows, tp_rank)
        else:
            full = unit.pack(reader.of_unit(unit))
            dense = (groups.layout.tp, tp_rank)
            expert = (groups.layout.expert_tp, groups.expert_tp_rank)
            weight = shard(full, unit, *(dense if unit.expert < 0 else expert))
        assert weight.shape == param.shape, (unit.megatron_name, weight.shape, param.shape)
        param.copy_(weight)


def vocab_rows(reader: HfReader, name: str, rows: int, rank: int) -> Tensor:
    """Shard ``rank`` of a vocabulary matrix, ``rows`` rows, zeros beyond the real vocabulary."""
    real = reader.rows(name, rank * rows, (rank + 1) * rows)
    return torch.nn.functional.pad(real, (0, 0, 0, rows - real.shape[0]))


def head_shard(hf: HfModel, rows: int, rank: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """The LM head of a folder in another model's shards: [rows, H], zeros past ``vocab_size``: the
    teacher's head lives in the student's shards, wherever its trunk is."""
    name = "model.embed_tokens.weight" if hf.shape.tied else "lm_head.weight"
    weight = vocab_rows(HfReader(hf.path), name, rows, rank)
    weight[max(0, vocab_size - rank * rows) :] = 0
    return weight.to(dtype)


def hf_buckets(
    model: MegatronModel, max_bytes: int, dtype: torch.dtype
) -> Iterator[list[tuple[str, Tensor]]]:
    """:meth:`WeightGatherer.buckets` of a model that is gathered once."""
    return WeightGatherer(model).buckets(max_bytes, dtype)


class WeightGatherer:
    """Gathers a model's weights as often as they are wanted. Which tensor is whose shard, and which
    units travel together, is worked out once: a model with many experts has tens of thousands, and
    training changes their values alone."""

    def __init__(self, model: MegatronModel) -> None:
        self._model = model
        self._plans: dict[tuple[int, torch.dtype], list[_Bucket]] = {}

    @cached_property
    def _local(self) -> dict[str, Tensor]:
        """This rank's parameters and buffers by their units' names."""
        return {unit.megatron_name: tensor for unit, tensor in named_units(self._model)}

    @torch.no_grad()
    def buckets(self, max_bytes: int, dtype: torch.dtype) -> Iterator[list[tuple[str, Tensor]]]:
        """The whole model as Hugging Face tensors on global rank 0, bucket by bucket.

        Collective: every rank iterates; other ranks get empty lists. Replica 0 alone sends. A
        bucket holds units of one stage and at most ``max_bytes`` (or one unit, or one expert of
        each expert-parallel rank, or all experts where Hugging Face has them in one tensor, and
        beyond that a unit that SGLang joins to the one before), so no rank holds more.
        """
        key = (max_bytes, dtype)
        if key not in self._plans:
            self._plans[key] = _bucket_plan(self._model, max_bytes, dtype)
        for bucket in self._plans[key]:
            in_fp32 = bucket.units[0].fp32_buffer
            sent_in = torch.float32 if in_fp32 else dtype
            yield _gather_bucket(self._model, self._local, bucket, sent_in)


@dataclass(frozen=True)
class _Bucket:
    """Parcels that travel together. A parcel is what each rank gives one shard of: a unit, or of
    an expert layer as many units as there are expert-parallel ranks."""

    kind: tuple[int, bool, bool]  # stage, whether of experts, whether kept in fp32
    parcels: tuple[tuple[Unit, ...], ...]

    @property
    def stage(self) -> int:
        return self.kind[0]

    @property
    def of_experts(self) -> bool:
        return self.kind[1]

    @property
    def units(self) -> list[Unit]:
        return [unit for parcel in self.parcels for unit in parcel]


def _bucket_plan(model: MegatronModel, max_bytes: int, dtype: torch.dtype) -> list[_Bucket]:
    buckets: list[_Bucket] = []
    filled = 0
    for parcel in _parcels(model):
        kind = _parcel_kind(parcel, model)
        size = sum(prod(s) for unit in parcel for s in unit.whole_hf_shapes) * dtype.itemsize
        if buckets and _of_one_stack(parcel[0], buckets[-1].parcels[-1][0]):
            buckets[-1] = _Bucket(kind, (*buckets[-1].parcels, parcel))
            continue
        full = filled + size > max_bytes and not parcel[0].with_previous
        if not buckets or buckets[-1].kind != kind or full:
            buckets.append(_Bucket(kind, (parcel,)))
            filled = 0
        else:
            buckets[-1] = _Bucket(kind, (*buckets[-1].parcels, parcel))
        filled += size
    return buckets


def _of_one_stack(unit: Unit, other: Unit) -> bool:
    return unit.stacked > 0 and unit.hf_names == other.hf_names


def _parcel_kind(parcel: Sequence[Unit], model: MegatronModel) -> tuple[int, bool, bool]:
    unit = parcel[0]
    return stage_of(unit, model.layers), unit.expert >= 0, unit.fp32_buffer


def _parcels(model: MegatronModel) -> list[tuple[Unit, ...]]:
    """All parcels, stage by stage: what every expert-parallel rank holds, then the experts."""
    stride = max(1, local_experts(model))
    experts: dict[tuple[int, int, str], list[Unit]] = {}
    parcels: list[tuple[Unit, ...]] = []
    for unit in model.hf.units:
        if unit.expert < 0:
            parcels.append((unit,))
        else:
            tail = unit.megatron_name.rpartition(f".{unit.expert}.")[2]
            experts.setdefault((unit.layer, unit.expert % stride, tail), []).append(unit)
    parcels += [tuple(sorted(units, key=lambda unit: unit.expert)) for units in experts.values()]
    return sorted(parcels, key=lambda parcel: _parcel_kind(parcel, model))


def stage_of(unit: Unit, layers: tuple[int, ...]) -> int:
    """The pipeline stage that holds ``unit``, from the layers on each stage."""
    last = -1
    for stage, count in enumerate(layers):
        last += count
        if unit.layer <= last:
            return stage
    return len(layers) - 1


def _gather_bucket(
    model: MegatronModel, local: Mapping[str, Tensor], bucket: _Bucket, dtype: torch.dtype
) -> list[tuple[str, Tensor]]:
    groups, rank = model.groups, dist.get_rank()
    replica = groups.expert_dp_rank if bucket.of_experts else groups.replica_rank
    if replica != 0:
        return []
    source = groups.layout.rank(0, 0, bucket.stage)
    tensors = _unshard_all(model, local, bucket, dtype) if groups.pp_rank == bucket.stage else []
    if rank == source and rank != 0:
        dist.send(torch.cat([t.reshape(-1) for t in tensors]), 0)
    if rank != 0:
        return []
    shapes = [torch.Size(shape) for unit in bucket.units for shape in unit.hf_shapes]
    if source != 0:
        sizes = [shape.numel() for shape in shapes]
        device = next(model.module.parameters()).device
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        dist.recv(flat, source)
        tensors = [t.view(s) for t, s in zip(flat.split(sizes), shapes, strict=True)]
    names = [(unit, name) for unit in bucket.units for name in unit.hf_names]
    parts = zip(names, tensors, strict=True)
    return list(joined((unit, name, tensor) for (unit, name), tensor in parts))


def _unshard_all(
    model: MegatronModel, local: Mapping[str, Tensor], bucket: _Bucket, dtype: torch.dtype
) -> list[Tensor]:
    """Hugging Face tensors of a bucket from one all-gather of this stage's flat shards."""
    shards = [
        next(local[unit.megatron_name] for unit in parcel if unit.megatron_name in local)
        .detach()
        .to(dtype)
        for parcel in bucket.parcels
    ]
    pg, layout = model.groups.pg, model.groups.layout
    group, tp = (pg.tp_ep, layout.expert_tp) if bucket.of_experts else (pg.tp, layout.tp)
    flat = torch.cat([s.reshape(-1) for s in shards])
    gathered = [flat]
    if group.size() > 1:
        gathered = [torch.empty_like(flat) for _ in range(group.size())]
        dist.all_gather(gathered, flat, group=group)
    by_rank = [part.split([s.numel() for s in shards]) for part in gathered]
    tensors: list[Tensor] = []
    for index, (parcel, own) in enumerate(zip(bucket.parcels, shards, strict=True)):
        parts = [ranks[index].view(own.shape) for ranks in by_rank]
        for place, unit in enumerate(parcel):  # the experts of the first ep rank, of the next, ...
            full = unshard(parts[place * tp : (place + 1) * tp], unit)
            if unit.megatron_name in VOCABULARY:
                full = full[: model.hf.shape.vocab_size]
            tensors += [part.contiguous() for part in unit.unpack(full)]
    return tensors
