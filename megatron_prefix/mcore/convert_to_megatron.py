"""A Hugging Face folder to a step in Megatron's format, streamed (see ``conversion.py``)."""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_prefix.layout import Layout
from megatron_prefix.mcore.checked_files import Behind
from megatron_prefix.mcore.conversion import (
    DTYPES,
    Conversion,
    Share,
    note_not_finite,
    run_files,
    scratch_in_turn,
)
from megatron_prefix.mcore.dist_files import DistFile, write_table
from megatron_prefix.mcore.dist_keys import Place, place_of
from megatron_prefix.mcore.export import copy_companions, exported_config
from megatron_prefix.mcore.forks import OnBytes
from megatron_prefix.mcore.hf_map.units import Unit
from megatron_prefix.mcore.manifest import write_manifest
from megatron_prefix.mcore.tensor_files import HfReader

STEP_FOLDER = "step_00000000"


HF_FOLDER = "hf"  # config and tokenizer, beside the steps


PIECE_BYTES = 2**28  # of a large unit that is written at once


def hf_to_megatron(job: Conversion, on_bytes: OnBytes, *, dry_run: bool = False) -> None:
    """Write ``job.output``/step_00000000, weights alone, and ``job.output``/hf.

    ValueError names every tensor with values that are not finite; nothing is left then. Each block
    is read back and compared before the folder takes its place. With ``dry_run`` only look.
    ``on_bytes`` is told of the sizes in ``job.dtype``.
    """
    if dry_run:
        run_files(job, functools.partial(_read_all, job), on_bytes)
        return
    with job.crew.new_folder(job.output) as partial:
        step = partial / STEP_FOLDER
        job.crew.lead(step.mkdir)
        shares = run_files(job, functools.partial(_write_dist, job, step), on_bytes)
        job.crew.lead(lambda: _finish_megatron(job, partial, shares))


def _packed(
    job: Conversion, source: HfReader, units: Sequence[Unit], share: Share
) -> Iterator[tuple[Unit, Tensor]]:
    """Each unit as Megatron has it, with the vocabulary's padding; lasts until the one after the
    next is asked for."""
    for unit, scratch in zip(units, scratch_in_turn(share), strict=False):
        dtype = job.dtype_of(unit)
        tensors = [tensor.to(dtype) for tensor in source.of_unit(unit, scratch)]
        for name, tensor in zip(unit.hf_names, tensors, strict=True):
            note_not_finite(name, tensor, share)
        packed = unit.pack(tensors)
        rows = place_of(unit, job.hf).size[-packed.dim()] - packed.shape[0]
        if rows:
            packed = torch.nn.functional.pad(packed, (0, 0, 0, rows))
        yield unit, packed


def _read_all(job: Conversion, number: int, share: Share, on_bytes: OnBytes) -> None:
    for _, packed in _packed(job, HfReader(job.hf.path), job.files[number], share):
        on_bytes(packed.nbytes)


def _write_dist(job: Conversion, step: Path, number: int, share: Share, on_bytes: OnBytes) -> None:
    name = f"__{number}_0.distcp"
    with DistFile(step / name) as file:
        if number == 0:
            share.common = file.add_common()
        with Behind() as behind:
            for unit, packed in _packed(job, HfReader(job.hf.path), job.files[number], share):
                if share.not_finite:  # nothing will be kept; go on for the other names
                    continue
                behind.submit(_add_unit, file, place_of(unit, job.hf), packed)
                on_bytes(packed.nbytes)
        share.sums[name] = file.close()
    share.written += file.written


def _add_unit(file: DistFile, place: Place, packed: Tensor) -> None:
    rows = max(1, PIECE_BYTES * packed.shape[0] // packed.nbytes)
    for start in range(0, packed.shape[0], rows):
        stop = min(start + rows, packed.shape[0])
        file.add(place.rows(packed.dim(), start, stop), packed[start:stop])


def _finish_megatron(job: Conversion, partial: Path, shares: Sequence[Share]) -> None:
    _finish_step(partial / STEP_FOLDER, shares)
    folder = partial / HF_FOLDER
    folder.mkdir()
    config = exported_config(job.hf.config, DTYPES[job.dtype])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    copy_companions(job.hf.path, folder)


def _finish_step(step: Path, shares: Sequence[Share]) -> None:
    """The table, the run's state and the manifest."""
    common = next(share.common for share in shares if share.common is not None)
    write_table(step, [block for share in shares for block in share.written], common)
    state: dict[str, object] = {"step": 0, "weights_only": True, "policy_version": 0}
    state["layout"] = Layout(tp=1, dp=1, pp=1).record
    (step / "run_state.json").write_text(json.dumps(state, indent=1))
    sums = {name: value for share in shares for name, value in share.sums.items()}
    write_manifest(step, sums)
