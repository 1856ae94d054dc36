"""Whole checkpoints from Hugging Face to Megatron's distributed format, and back.

The functions with ``_on_rank`` run on each rank of a small world of their own (``ranks.py``): one
rank holds the whole model in host memory, N pipeline ranks an N-th each.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

from megatron_prefix.config import ModelConfig
from megatron_prefix.layout import model_layout
from megatron_prefix.mcore.contents import MegatronContents, read_step
from megatron_prefix.mcore.export import copy_companions, export_hf
from megatron_prefix.mcore.folders import PARTIAL, finish_folder, start_folder
from megatron_prefix.mcore.groups import build_groups, initialize_megatron
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.model import DTYPES, MegatronModel, build_model
from megatron_prefix.mcore.progress_bar import byte_progress
from megatron_prefix.mcore.ranks import run_on_ranks
from megatron_prefix.mcore.weights import HfReader, hf_buckets, load_hf_weights, named_units

STEP_FOLDER = "step_00000000"
HF_FOLDER = "hf"  # config and tokenizer, beside the steps
VERIFY_BYTES = 2**30


@dataclass(frozen=True)
class Conversion:
    """What to convert, and how."""

    hf_model: Path  # gives config and tokenizer; to Megatron, the weights too
    output: Path
    dtype: str  # bf16 | fp32
    pipeline_ranks: int = 1
    step_folder: Path = Path()  # from Megatron: the checkpoint of one step

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(
            hf_path=str(self.hf_model),
            params_dtype=self.dtype,
            pipeline_model_parallel_size=self.pipeline_ranks,
        )


def hf_to_megatron(job: Conversion) -> None:
    """Write ``job.output``/step_00000000, weights alone, and ``job.output``/hf."""
    run_on_ranks(job.pipeline_ranks, _to_megatron_on_rank, job)


def megatron_to_hf(job: Conversion, *, dry_run: bool = False) -> None:
    """Write ``job.output`` out of ``job.step_folder``, whichever layout that was saved in. With
    ``dry_run`` only see that the step holds the model, and only finite values."""
    run_on_ranks(job.pipeline_ranks, _to_hf_on_rank, job, dry_run)


def _to_megatron_on_rank(job: Conversion) -> None:
    model = empty_model(job.model_config, job.pipeline_ranks)
    load_hf_weights(model)
    step = job.output.with_name(job.output.name + PARTIAL) / STEP_FOLDER
    if dist.get_rank() == 0:
        partial = start_folder(job.output)
        step.mkdir()
        state = {"step": 0, "weights_only": True, "policy_version": 0, "layout": layout_of(model)}
        (step / "run_state.json").write_text(json.dumps(state, indent=1))
        _write_hf_folder(job, partial / HF_FOLDER)
    dist.barrier()
    save_weights(model, step)
    verify_integrity_manifest(str(step))
    _verify_against_source(model, step)
    if dist.get_rank() == 0:
        finish_folder(job.output)


def _write_hf_folder(job: Conversion, folder: Path) -> None:
    folder.mkdir()
    config = (job.hf_model / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(config, encoding="utf-8")
    copy_companions(job.hf_model, folder)


def _to_hf_on_rank(job: Conversion, dry_run: bool) -> None:
    model = empty_model(job.model_config, job.pipeline_ranks)
    load_weights(model, job.step_folder)
    _refuse_not_finite(model, job.step_folder)
    if dry_run:
        return
    dtype = DTYPES[job.dtype]
    total = sum(torch.Size(s).numel() for u in model.hf.units for s in u.hf_shapes)
    with byte_progress("writing", total * dtype.itemsize, show=dist.get_rank() == 0) as advance:
        export_hf(model, job.output, dtype, on_bytes=advance, verify=True)


def _refuse_not_finite(model: MegatronModel, step: Path) -> None:
    """Collective: every rank raises, with the names of all ranks."""
    mine = [
        name
        for unit, parameter in named_units(model)
        if not parameter.isfinite().all()
        for name in unit.hf_names
    ]
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine)
    if names := sorted({name for rank in found for name in rank}):
        raise ValueError(f"{step}: values that are not finite in {', '.join(names)}")


def empty_model(config: ModelConfig, world_size: int) -> MegatronModel:
    """A model on this rank, weights not loaded. Collective."""
    initialize_megatron(0)
    groups = build_groups(model_layout(config, world_size))
    hf = read_hf_model(config.hf_path)
    return build_model(config, hf, groups, owner="model", with_head=True)


def layout_of(model: MegatronModel) -> list[int]:
    """As in the run_state.json of a run: tp, dp, pp."""
    layout = model.groups.layout
    return [layout.tp, layout.dp, layout.pp]


def save_weights(model: MegatronModel, step: Path) -> None:
    """Save the weights as a run's checkpoint holds them, with a manifest. Collective."""
    dist_checkpointing.save({"model": _sharded(model)}, str(step), verify_integrity=True)


def load_weights(model: MegatronModel, step: Path) -> None:
    """Fill ``model`` from a run's checkpoint or a converted one, of any layout. Collective.

    ValueError names all tensors that are missing there or have another shape.
    """
    sharded = _sharded(model)
    _refuse_other_model(sharded, read_step(step), step)
    state = dist_checkpointing.load({"model": sharded}, str(step))
    model.module.load_state_dict(state["model"])


def _sharded(model: MegatronModel) -> dict[str, Any]:
    return model.module.sharded_state_dict(metadata={"dp_cp_group": model.groups.pg.dp_cp})


def _refuse_other_model(sharded: dict[str, Any], saved: MegatronContents, step: Path) -> None:
    wrong = []
    for tensor in _tensors(sharded):
        there = saved.shapes.get(tensor.key)
        wanted = tuple(tensor.global_shape)
        if there is None:
            wrong.append(f"{tensor.key} is missing")
        elif there != wanted and not tensor.allow_shape_mismatch:
            wrong.append(f"{tensor.key} has shape {list(there)}, not {list(wanted)}")
    if wrong:
        raise ValueError(
            f"{step} does not hold the model of --hf-model: {'; '.join(sorted(set(wrong)))}"
        )


def _tensors(sharded: dict[str, Any]) -> list[ShardedTensor]:
    found: list[ShardedTensor] = []
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensorFactory):
            found += _tensors({"built": value.build()})
        elif isinstance(value, ShardedTensor):
            found.append(value)
    return found


@torch.no_grad()
def _verify_against_source(model: MegatronModel, step: Path) -> None:
    """Load what was saved into the emptied model and compare it with the source bit for bit."""
    for parameter in model.module.parameters():
        parameter.zero_()
    load_weights(model, step)
    reader, dtype = HfReader(model.hf.path), model.config.params_dtype
    total = sum(torch.Size(s).numel() for u in model.hf.units for s in u.hf_shapes)
    with byte_progress("verifying", total * dtype.itemsize, show=dist.get_rank() == 0) as advance:
        for bucket in hf_buckets(model, VERIFY_BYTES, dtype):
            for name, tensor in bucket:
                if not torch.equal(reader.tensor(name).to(tensor.dtype), tensor.cpu()):
                    raise RuntimeError(f"{step}: {name} reads back otherwise than it was written")
                advance(tensor.nbytes)
