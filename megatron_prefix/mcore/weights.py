"""Moves weights between Hugging Face tensors and a model's tensor- and pipeline-parallel shards."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from megatron_prefix.mcore.hf_map.units import Unit
from megatron_prefix.mcore.model import MegatronModel

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
# Transformer Engine fuses a norm into the linear layer behind it and names its weight there.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


class HfReader:
    """Tensors of a safetensors folder by name, one at a time."""

    def __init__(self, path: Path) -> None:
        self._files = _tensor_files(path)
        self._open: dict[Path, safe_open] = {}

    def tensor(self, name: str) -> Tensor:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file].get_tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of a matrix, clipped to those it has."""
        file = self._files[name]
        with safe_open(file, framework="pt") as opened:
            view = opened.get_slice(name)
            stop = min(stop, view.get_shape()[0])
            return view[min(start, stop) : stop]


def _tensor_files(path: Path) -> dict[str, Path]:
    """The file of each tensor, from the files themselves (an index may be stale)."""
    files: dict[str, Path] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    return files


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


def named_units(model: MegatronModel) -> Iterator[tuple[Unit, torch.nn.Parameter]]:
    """This rank's parameters with the units they are shards of."""
    units = {unit.megatron_name: unit for unit in model.hf.units}
    for local_name, param in model.module.named_parameters():
        name = global_name(model, local_name)
        if name == "output_layer.weight" and name not in units:
            name = "embedding.word_embeddings.weight"  # a tied head on another stage: its own copy
        yield units[name], param


def global_name(model: MegatronModel, local_name: str) -> str:
    """A parameter's name with the layer counted over all stages, and norms by their own names."""
    parts = local_name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(model.module.decoder.layers[int(parts[2])].layer_number - 1)
        tail = ".".join(parts[3:])
        parts[3:] = [FUSED_NORMS.get(tail, tail)]
    return ".".join(parts)


@torch.no_grad()
def load_hf_weights(model: MegatronModel) -> None:
    """Fill this rank's shards from the Hugging Face folder, one unit in memory at a time."""
    reader = HfReader(model.hf.path)
    layout, tp_rank = model.groups.layout, model.groups.tp_rank
    for unit, param in named_units(model):
        if unit.megatron_name in VOCABULARY:
            weight = vocab_rows(reader, unit.hf_names[0], model.vocab_rows, tp_rank)
        else:
            full = unit.pack([reader.tensor(name) for name in unit.hf_names])
            weight = shard(full, unit, layout.tp, tp_rank)
        assert weight.shape == param.shape, (unit.megatron_name, weight.shape, param.shape)
        param.copy_(weight)


def vocab_rows(reader: HfReader, name: str, rows: int, rank: int) -> Tensor:
    """Shard ``rank`` of a vocabulary matrix, ``rows`` rows, zeros beyond the real vocabulary."""
    real = reader.rows(name, rank * rows, (rank + 1) * rows)
    return torch.nn.functional.pad(real, (0, 0, 0, rows - real.shape[0]))


def head_shard(model: MegatronModel, rows: int, rank: int, vocab_size: int) -> Tensor:
    """The LM head of ``model``'s folder in another model's shards: [rows, H], zeros past
    ``vocab_size`` (kl.md: the teacher's head lives in the student's shards)."""
    name = "model.embed_tokens.weight" if model.hf.shape.tied else "lm_head.weight"
    weight = vocab_rows(HfReader(model.hf.path), name, rows, rank)
    weight[max(0, vocab_size - rank * rows) :] = 0
    return weight.to(model.config.params_dtype)


@torch.no_grad()
def hf_buckets(
    model: MegatronModel, max_bytes: int, dtype: torch.dtype
) -> Iterator[list[tuple[str, Tensor]]]:
    """The whole model as Hugging Face tensors on global rank 0, bucket by bucket.

    Collective: every rank iterates; other ranks get empty lists. Replica 0 alone sends. A bucket
    holds units of one stage and at most ``max_bytes`` (or one unit), so no rank holds more.
    """
    for stage, units in _bucket_plan(model, max_bytes, dtype):
        yield _gather_bucket(model, stage, units, dtype)


def _bucket_plan(
    model: MegatronModel, max_bytes: int, dtype: torch.dtype
) -> list[tuple[int, list[Unit]]]:
    plan: list[tuple[int, list[Unit]]] = []
    filled = 0
    for unit in sorted(model.hf.units, key=lambda unit: unit.layer):
        stage = stage_of(unit, model.layers)
        size = sum(torch.Size(s).numel() for s in unit.hf_shapes) * dtype.itemsize
        if not plan or plan[-1][0] != stage or filled + size > max_bytes:
            plan.append((stage, []))
            filled = 0
        plan[-1][1].append(unit)
        filled += size
    return plan


def stage_of(unit: Unit, layers: tuple[int, ...]) -> int:
    """The pipeline stage that holds ``unit``, from the layers on each stage."""
    last = -1
    for stage, count in enumerate(layers):
        last += count
        if unit.layer <= last:
            return stage
    return len(layers) - 1


def _gather_bucket(
    model: MegatronModel, stage: int, units: list[Unit], dtype: torch.dtype
) -> list[tuple[str, Tensor]]:
    groups, rank = model.groups, dist.get_rank()
    layout = groups.layout
    if groups.dp_rank != 0:
        return []
    source = layout.rank(0, 0, stage)
    tensors = _unshard_all(model, units, dtype) if groups.pp_rank == stage else []
    if rank == source and rank != 0:
        dist.send(torch.cat([t.reshape(-1) for t in tensors]), 0)
    if rank != 0:
        return []
    shapes = [torch.Size(shape) for unit in units for shape in unit.hf_shapes]
    if source != 0:
        sizes = [shape.numel() for shape in shapes]
        device = next(model.module.parameters()).device
        flat = torch.empty(sum(sizes), dtype=dtype, device=device)
        dist.recv(flat, source)
        tensors = [t.view(s) for t, s in zip(flat.split(sizes), shapes, strict=True)]
    names = [name for unit in units for name in unit.hf_names]
    return list(zip(names, tensors, strict=True))


def _unshard_all(model: MegatronModel, units: list[Unit], dtype: torch.dtype) -> list[Tensor]:
    """Hugging Face tensors of ``units`` from one all-gather of this stage's flat shards."""
    local = {unit.megatron_name: param for unit, param in named_units(model)}
    shards = [local[unit.megatron_name].detach().to(dtype) for unit in units]
    tp = model.groups.layout.tp
    flat = torch.cat([s.reshape(-1) for s in shards])
    gathered = [flat]
    if tp > 1:
        gathered = [torch.empty_like(flat) for _ in range(tp)]
        dist.all_gather(gathered, flat, group=model.groups.pg.tp)
    sizes = [s.numel() for s in shards]
    by_rank = [part.split(sizes) for part in gathered]
    tensors: list[Tensor] = []
    for index, (unit, own) in enumerate(zip(units, shards, strict=True)):
        full = unshard([ranks[index].view(own.shape) for ranks in by_rank], unit)
        if unit.megatron_name in VOCABULARY:
            full = full[: model.hf.shape.vocab_size]
        tensors += [part.contiguous() for part in unit.unpack(full)]
    return tensors
