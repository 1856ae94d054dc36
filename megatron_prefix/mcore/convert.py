"""Whole checkpoints from Hugging Face to Megatron's distributed format, and back, streamed.

No model is built and no process group is made: a unit of the family's map (``hf_map/units.py``) is
read, turned and written, then the next. A process holds one unit at a time, a few times over.
Output goes into files of at most SHARD_BYTES, which several processes share.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME
from torch import Tensor

from megatron_prefix.hf_folder import BLOCK, SCALE
from megatron_prefix.mcore.checked_files import Behind, Scratch
from megatron_prefix.mcore.contents import MegatronContents
from megatron_prefix.mcore.crew import Crew
from megatron_prefix.mcore.dist_files import DistFile, DistReader, Written, write_table
from megatron_prefix.mcore.dist_keys import VOCABULARY, Place, place_of
from megatron_prefix.mcore.export import INDEX, SHARD_BYTES, copy_companions, exported_config
from megatron_prefix.mcore.forks import OnBytes, run_forked
from megatron_prefix.mcore.fp8_blocks import (
    E4M3,
    block_grid,
    quantization_config,
    quantize_blocks,
    quantized,
)
from megatron_prefix.mcore.hf_map import HfModel
from megatron_prefix.mcore.hf_map.units import Unit, joined
from megatron_prefix.mcore.steps import refuse_other_model
from megatron_prefix.mcore.tensor_files import HfReader, write_tensors

STEP_FOLDER = "step_00000000"
HF_FOLDER = "hf"  # config and tokenizer, beside the steps
PIECE_BYTES = 2**28  # of a large unit that is written at once
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": E4M3}
Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Conversion:
    """What to convert, and how."""

    hf: HfModel  # gives config and tokenizer; to Megatron, the weights too
    output: Path
    dtype: str  # bf16 | fp32; from Megatron, fp8 too
    ranks: int = 1  # processes, each started by this one
    shard_bytes: int = SHARD_BYTES
    crew: Crew = Crew()  # or processes that torchrun started

    def __post_init__(self) -> None:
        if self.dtype == "fp8" and any(unit.stacked for unit in self.hf.units):
            raise ValueError(
                f"--dtype fp8: blocks of {BLOCK} x {BLOCK} are for matrices, and "
                f"{self.hf.config['architectures'][0]} has its experts stacked; choose bf16"
            )

    def dtype_of(self, unit: Unit) -> torch.dtype:
        """A router's bias stays in fp32; of FP8 only what ``quantized`` says is."""
        if unit.fp32_buffer:
            return torch.float32
        dtype = DTYPES[self.dtype]
        return torch.bfloat16 if dtype == E4M3 and not quantized(unit, self.hf) else dtype

    def files(self) -> list[list[Unit]]:
        """The units of each file, in the model's order."""
        files: list[list[Unit]] = []
        filled = 0
        for unit in self.hf.units:
            size = torch.Size(unit.shape).numel() * self.dtype_of(unit).itemsize
            within = unit.stacked > 0 and unit.expert > 0  # a stack is one tensor of one file
            if not files or filled + size * (unit.stacked or 1) > self.shard_bytes and not within:
                files.append([])
                filled = 0
            files[-1].append(unit)
            filled += size
        return files

    @property
    def bytes(self) -> int:
        """Of what is written, without FP8's scales."""
        units = self.hf.units
        return sum(torch.Size(u.shape).numel() * self.dtype_of(u).itemsize for u in units)


@dataclass
class _Share:
    """What one process wrote and found."""

    written: list[Written] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)  # SHA-256 by file
    common: Any = None
    not_finite: list[str] = field(default_factory=list)
    memory: tuple[Scratch, ...] = field(default_factory=lambda: (Scratch(), Scratch()))


def hf_to_megatron(job: Conversion, on_bytes: OnBytes, *, dry_run: bool = False) -> None:
    """Write ``job.output``/step_00000000, weights alone, and ``job.output``/hf.

    ValueError names every tensor with values that are not finite; nothing is left then. Each block
    is read back and compared before the folder takes its place. With ``dry_run`` only look.
    ``on_bytes`` is told of the sizes in ``job.dtype``.
    """
    if dry_run:
        _run(job, lambda number, share, told: _read_all(job, number, share, told), on_bytes)
        return
    with job.crew.new_folder(job.output) as partial:
        step = partial / STEP_FOLDER
        job.crew.lead(step.mkdir)
        shares = _run(
            job, lambda number, share, told: _write_dist(job, step, number, share, told), on_bytes
        )
        job.crew.lead(lambda: _finish_megatron(job, partial, shares))


def _finish_megatron(job: Conversion, partial: Path, shares: Sequence[_Share]) -> None:
    _finish_step(partial / STEP_FOLDER, shares)
    folder = partial / HF_FOLDER
    folder.mkdir()
    config = exported_config(job.hf.config, DTYPES[job.dtype])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    copy_companions(job.hf.path, folder)


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
        _run(job, lambda number, share, told: _load_all(job, source, number, share, told), on_bytes)
        return
    with job.crew.new_folder(job.output) as partial:
        _run(
            job,
            lambda number, share, told: _write_hf(job, source, partial, number, share, told),
            on_bytes,
        )
        job.crew.lead(lambda: _finish_hf(job, partial))


FileWork = Callable[[int, _Share, OnBytes], None]  # the file's number


def _run(job: Conversion, work: FileWork, on_bytes: OnBytes) -> list[_Share]:
    """Every file by one of the processes; all their shares, in each of torchrun's."""
    count, processes = len(job.files()), job.ranks * job.crew.size

    def share_of(rank: int, told: OnBytes) -> _Share:
        share = _Share()
        for number in range(rank + job.crew.rank, count, processes):
            work(number, share, told)
        share.memory = ()  # a share travels between processes
        return share

    assert job.ranks == 1 or job.crew.size == 1, job
    of_all = job.crew.each(lambda: run_forked(job.ranks, share_of, on_bytes))
    shares = [share for of_one in of_all for share in of_one]
    if names := sorted({name for share in shares for name in share.not_finite}):
        raise ValueError(f"values that are not finite in {len(names)} tensors: {', '.join(names)}")
    return shares


def _packed(
    job: Conversion, source: HfReader, units: Sequence[Unit], share: _Share
) -> Iterator[tuple[Unit, Tensor]]:
    """Each unit as Megatron has it, with the vocabulary's padding; lasts until the one after the
    next is asked for."""
    for unit, scratch in zip(units, _in_turn(share), strict=False):
        tensors = source.of_unit(unit, scratch)
        for name, tensor in zip(unit.hf_names, tensors, strict=True):
            _look_at(name, tensor, share)
        packed = unit.pack(tensors).to(job.dtype_of(unit))
        rows = place_of(unit, job.hf).size[-packed.dim()] - packed.shape[0]
        if rows:
            packed = torch.nn.functional.pad(packed, (0, 0, 0, rows))
        yield unit, packed


def _in_turn(share: _Share) -> Iterator[Scratch]:
    """One is read into while the other is written out; cleared."""
    for scratch in itertools.cycle(share.memory):
        scratch.clear()
        yield scratch


def _look_at(name: str, tensor: Tensor, share: _Share) -> None:
    # One number says no quickly; where it says yes, the sum may just have been too large.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        share.not_finite.append(name)


def _read_all(job: Conversion, number: int, share: _Share, on_bytes: OnBytes) -> None:
    for _, packed in _packed(job, HfReader(job.hf.path), job.files()[number], share):
        on_bytes(packed.nbytes)


def _write_dist(job: Conversion, step: Path, number: int, share: _Share, on_bytes: OnBytes) -> None:
    name = f"__{number}_0.distcp"
    with DistFile(step / name) as file:
        if number == 0:
            share.common = file.add_common()
        with Behind() as behind:
            for unit, packed in _packed(job, HfReader(job.hf.path), job.files()[number], share):
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


def _finish_step(step: Path, shares: Sequence[_Share]) -> None:
    """The table, the run's state and the manifest."""
    common = next(share.common for share in shares if share.common is not None)
    write_table(step, [block for share in shares for block in share.written], common)
    state = {"step": 0, "weights_only": True, "policy_version": 0, "layout": [1, 1, 1]}
    (step / "run_state.json").write_text(json.dumps(state, indent=1))
    sums = {name: value for share in shares for name, value in share.sums.items()}
    for file in step.iterdir():
        if file.name not in sums:
            sums[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest = {"algorithm": "sha256", "files": dict(sorted(sums.items()))}
    (step / INTEGRITY_FNAME).write_text(json.dumps(manifest, indent=2))


def _unpacked(
    job: Conversion, source: DistReader, units: Sequence[Unit], share: _Share
) -> Iterator[tuple[str, Tensor]]:
    """The units' tensors as Hugging Face has them, FP8's scales behind their weights; they last
    until those of the unit after the next are asked for."""
    return joined(_by_unit(job, source, units, share))


def _by_unit(
    job: Conversion, source: DistReader, units: Sequence[Unit], share: _Share
) -> Iterator[tuple[Unit, str, Tensor]]:
    for unit, scratch in zip(units, _in_turn(share), strict=False):
        place, dtype = place_of(unit, job.hf), job.dtype_of(unit)
        if unit.megatron_name in VOCABULARY:
            whole = source.shape(place.key)
            assert whole is not None
            place = Place(place.key, whole, place.offset, unit.shape)
        memory = Scratch() if unit.stacked else scratch  # a stack waits for its last expert
        parameter = source.read(place, memory).view(unit.shape)
        for name, tensor in zip(unit.hf_names, unit.unpack(parameter), strict=True):
            _look_at(name, tensor, share)
            if dtype == E4M3:
                weight, scale = quantize_blocks(tensor)
                yield unit, name, weight
                yield unit, name + SCALE, scale
            else:
                yield unit, name, tensor.to(dtype)


def _load_all(
    job: Conversion, source: DistReader, number: int, share: _Share, on_bytes: OnBytes
) -> None:
    for _, tensor in _unpacked(job, source, job.files()[number], share):
        on_bytes(tensor.nbytes)


def _write_hf(
    job: Conversion,
    source: DistReader,
    folder: Path,
    number: int,
    share: _Share,
    on_bytes: OnBytes,
) -> None:
    files = job.files()
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
    files = job.files()
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
