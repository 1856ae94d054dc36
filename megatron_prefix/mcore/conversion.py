"""What both directions of a conversion share: the job, its files over processes, what each finds.

No model is built and no process group is made: a unit of the family's map (``hf_map/units.py``) is
read, turned and written, then the next. A process holds one unit at a time, a few times over.
Output goes into files of at most SHARD_BYTES, which several processes share.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.hf_folder import BLOCK
from megatron_prefix.mcore.checked_files import Scratch
from megatron_prefix.mcore.crew import Crew
from megatron_prefix.mcore.dist_files import Written
from megatron_prefix.mcore.export import SHARD_BYTES
from megatron_prefix.mcore.forks import OnBytes, run_forked
from megatron_prefix.mcore.fp8_blocks import E4M3, quantized
from megatron_prefix.mcore.hf_map import HfModel
from megatron_prefix.mcore.hf_map.units import Unit

PROCESSES = 8  # that a conversion takes by itself at most: disks are slower than more of them
# Bytes that a process holds of each value of its largest tensor, about: one is read while another
# is written, and FP8 is made out of fp32.
_HELD = {"bf16": 4, "fp32": 8, "fp8": 14}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": E4M3}


@dataclass(frozen=True)
class Conversion:
    """What to convert, and how."""

    hf: HfModel  # gives config and tokenizer; to Megatron, the weights too
    output: Path
    dtype: str  # bf16 | fp32; from Megatron, fp8 too
    ranks: int = 1  # processes, each started by this one; 0: see ``processes``
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

    @functools.cached_property
    def files(self) -> list[list[Unit]]:
        """The units of each file, in the model's order.

        Where there is more than one file, they are of like size, as far as tensors let them, and
        PROCESSES of them or a multiple: as many processes have the same to do.
        """
        if self.bytes <= self.shard_bytes:
            return [list(self.hf.units)]
        least = -(-self.bytes // self.shard_bytes)
        # With nearly full files, closed before a tensor that is too much, there is one too many.
        for count in range(-(-least // PROCESSES) * PROCESSES, 2 * least + PROCESSES, PROCESSES):
            files = self._split(self.bytes / count)
            if len(files) % PROCESSES == 0:
                break
        return files

    def _split(self, like: float) -> list[list[Unit]]:
        """Into files of ``like`` bytes, none above ``shard_bytes`` unless for a single tensor."""
        files: list[list[Unit]] = []
        filled = before = 0
        for unit in self.hf.units:
            size = self.bytes_of(unit)
            within = unit.stacked > 0 and unit.expert > 0  # a stack is one tensor of one file
            too_much = filled + size * (unit.stacked or 1) > self.shard_bytes
            if not files or (before >= like * len(files) or too_much) and not within:
                files.append([])
                filled = 0
            files[-1].append(unit)
            filled += size
            before += size
        return files

    @property
    def processes(self) -> int:
        """``ranks``; where that is 0, one for each core, while there is a file for each, and they
        hold about two files' bytes or less together. One of torchrun's is one."""
        if self.ranks or self.crew.size > 1:
            return max(1, self.ranks)
        held = sorted((max(map(self._held, units)) for units in self.files), reverse=True)
        room = sum(total <= 2 * self.shard_bytes for total in itertools.accumulate(held))
        return max(1, min(PROCESSES, len(os.sched_getaffinity(0)), room))

    def _held(self, unit: Unit) -> int:
        return torch.Size(unit.shape).numel() * (unit.stacked or 1) * _HELD[self.dtype]

    def bytes_of(self, unit: Unit) -> int:
        return torch.Size(unit.shape).numel() * self.dtype_of(unit).itemsize

    @property
    def bytes(self) -> int:
        """Of what is written, without FP8's scales."""
        return sum(map(self.bytes_of, self.hf.units))


@dataclass
class Share:
    """What one process wrote and found."""

    written: list[Written] = field(default_factory=list)
    sums: dict[str, str] = field(default_factory=dict)  # by file, for the manifest
    common: Any = None
    not_finite: list[str] = field(default_factory=list)
    memory: tuple[Scratch, ...] = field(default_factory=lambda: (Scratch(), Scratch()))


FileWork = Callable[[int, Share, OnBytes], None]  # the file's number


def run_files(job: Conversion, work: FileWork, on_bytes: OnBytes) -> list[Share]:
    """Every file by one of the processes; all their shares, in each of torchrun's."""
    count, here = len(job.files), job.processes
    processes = here * job.crew.size

    def share_of(rank: int, told: OnBytes) -> Share:
        share = Share()
        for number in range(rank + job.crew.rank, count, processes):
            work(number, share, told)
        share.memory = ()  # a share travels between processes
        return share

    assert here == 1 or job.crew.size == 1, job
    of_all = job.crew.each(lambda: run_forked(here, share_of, on_bytes))
    shares = [share for of_one in of_all for share in of_one]
    if names := sorted({name for share in shares for name in share.not_finite}):
        raise ValueError(f"values that are not finite in {len(names)} tensors: {', '.join(names)}")
    return shares


def scratch_in_turn(share: Share) -> Iterator[Scratch]:
    """One is read into while the other is written out; cleared."""
    for scratch in itertools.cycle(share.memory):
        scratch.clear()
        yield scratch


def note_not_finite(name: str, tensor: Tensor, share: Share) -> None:
    """Keep a tensor's name where one of its values is not finite, in the dtype that is written: a
    large one of fp32 has no place in bf16."""
    # One number says no quickly; where it says yes, the sum may just have been too large.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        share.not_finite.append(name)
