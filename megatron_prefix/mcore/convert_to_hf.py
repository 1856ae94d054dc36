"""A step in Megatron's format to a Hugging Face folder, streamed (see ``conversion.py``)."""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_prefix.hf_folder import SCALE
from megatron_prefix.mcore.checked_files import Scratch
from megatron_prefix.mcore.contents import MegatronContents
from megatron_prefix.mcore.conversion import (
    DTYPES,
    Conversion,
    Share,
    note_not_finite,
    run_files,
    scratch_in_turn,
)
from megatron_prefix.mcore.dist_files import DistReader
from megatron_prefix.mcore.dist_keys import VOCABULARY, Place, place_of
from megatron_prefix.mcore.export import INDEX, copy_companions, exported_config
from megatron_prefix.mcore.forks import OnBytes
from megatron_prefix.mcore.fp8_blocks import E4M3, block_grid, quantization_config, quantize_blocks
from megatron_prefix.mcore.hf_map.units import Unit, joined
from megatron_prefix.mcore.steps import refuse_other_model
from megatron_prefix.mcore.tensor_files import write_tensors

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def megatron_to_hf(
    job: Conversion, saved: MegatronContents, on_bytes: OnBytes, *, dry_run: bool = False
) -> None:
    """Write ``job.output`` out of a step's folder, whichever layout that was saved in.

    ValueError names every tensor that is missing there, unknown or of another shape, and every one
    with values that are not finite; nothing is left then. With ``dry_run`` only look.
    """
    refuse_other_model(job.hf, saved.path, saved.weights)
    source = DistReader(saved.path)
    if dry_run:
        run_files(job, functools.partial(_load_all, job, source), on_bytes)
        return
    with job.crew.new_folder(job.output) as partial:
        run_files(job, functools.partial(_write_hf, job, source, partial), on_bytes)
        job.crew.lead(lambda: _finish_hf(job, partial))


def _unpacked(
    job: Conversion, source: DistReader, units: Sequence[Unit], share: Share
) -> Iterator[tuple[str, Tensor]]:
    """The units' tensors as Hugging Face has them, FP8's scales behind their weights; they last
    until those of the unit after the next are asked for."""
    return joined(_by_unit(job, source, units, share))


def _by_unit(
    job: Conversion, source: DistReader, units: Sequence[Unit], share: Share
) -> Iterator[tuple[Unit, str, Tensor]]:
    for unit, scratch in zip(units, scratch_in_turn(share), strict=False):
        place, dtype = place_of(unit, job.hf), job.dtype_of(unit)
        if unit.megatron_name in VOCABULARY:
            whole = source.shape(place.key)
            assert whole is not None
            place = Place(place.key, whole, place.offset, unit.shape)
        memory = Scratch() if unit.stacked else scratch  # a stack waits for its last expert
        parameter = source.read(place, memory).view(unit.shape)
        for name, tensor in zip(unit.hf_names, unit.unpack(parameter), strict=True):
            if dtype == E4M3:
                note_not_finite(name, tensor, share)
                weight, scale = quantize_blocks(tensor)
                yield unit, name, weight
                yield unit, name + SCALE, scale
            else:
                written = tensor.to(dtype)
                note_not_finite(name, written, share)
                yield unit, name, written


def _load_all(
    job: Conversion, source: DistReader, number: int, share: Share, on_bytes: OnBytes
) -> None:
    for _, tensor in _unpacked(job, source, job.files[number], share):
        on_bytes(tensor.nbytes)


def _write_hf(
    job: Conversion,
    source: DistReader,
    folder: Path,
    number: int,
    share: Share,
    on_bytes: OnBytes,
) -> None:
    files = job.files
    tensors = _unpacked(job, source, files[number], share)
    write_tensors(
        folder / _file_name(number, len(files)), _shapes(job, files[number]), tensors, on_bytes
    )


def _file_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _shapes(job: Conversion, units: Sequence[Unit]) -> Shapes:
    shapes: Shapes = {}
    for unit in units:
        dtype = job.dtype_of(unit)
        for name, shape in zip(unit.hf_names, unit.whole_hf_shapes, strict=True):
            shapes[name] = (tuple(shape), dtype)
            if dtype == E4M3:
                shapes[name + SCALE] = (block_grid(shape), torch.float32)
    return shapes


def _finish_hf(job: Conversion, folder: Path) -> None:
    """The index, the config and what goes along."""
    files = job.files
    shapes = [_shapes(job, units) for units in files]
    total = sum(
        torch.Size(shape).numel() * dtype.itemsize
        for of_file in shapes
        for shape, dtype in of_file.values()
    )
    names = {
        name: _file_name(number, len(files)) for number, of in enumerate(shapes) for name in of
    }
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    stored = torch.bfloat16 if job.dtype == "fp8" else DTYPES[job.dtype]
    config = exported_config(job.hf.config, stored)
    if job.dtype == "fp8":
        whole = [
            name.removesuffix(".weight")
            for unit in job.hf.units
            if "router.weight" in unit.megatron_name
            for name in unit.hf_names
        ]
        config["quantization_config"] = quantization_config(["lm_head", *whole])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    copy_companions(job.hf.path, folder)
