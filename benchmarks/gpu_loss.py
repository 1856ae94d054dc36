"""Time and memory of the vocab-parallel divergence on NVIDIA GPUs, bf16.

    python benchmarks/gpu_loss.py [--quick] [--json FILE]
    torchrun --nproc-per-node 8 benchmarks/gpu_loss.py      tensor parallel over the GPUs

Medians of CUDA events after a warm-up. Rows are shards of one size: N 16384, V 151936,
d_s 4096, d_t 7168; on one GPU the shard of one rank in eight (without its collectives), and the
whole vocabulary beside Liger's Triton kernel, where it is installed. ``over_gemms`` divides by
the four GEMMs alone at the same chunk; ``peak_mib`` is above the inputs and main_grad. Over several
GPUs ``hidden`` is the share of the collectives' own time that does not show in the loss's.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_prefix.loss import Workspace, gemm, prefix_divergence
from megatron_prefix.loss.task import CPU_LIMITS, GPU_LIMITS, chosen_chunk

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
STATISTICS = 5  # fp64 numbers a token that the ranks gather
BETA = 0.5


@dataclass(frozen=True)
class Size:
    """Of one rank: its rows of the vocabulary."""

    positions: int
    rows: int
    student_width: int = 4096
    teacher_width: int = 7168


SHARD = Size(16384, 151936 // 8)
WHOLE = Size(16384, 151936)
QUICK_WHOLE = Size(2048, 151936)


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [N, d_s], wants a gradient
    weight: Tensor  # [rows, d_s], wants a gradient, with a main_grad
    teacher_hidden: Tensor  # [N, d_t]
    teacher_weight: Tensor  # [rows, d_t]
    token_weight: Tensor  # fp32 [N]
    workspace: Workspace

    @property
    def chunk(self) -> int:
        limits = GPU_LIMITS if self.hidden.is_cuda else CPU_LIMITS
        return chosen_chunk(self.hidden.shape[0], 2 * self.weight.shape[0], limits)


@dataclass(frozen=True)
class Row:
    method: str
    divergence: str
    ranks: int
    positions: int
    rows: int
    ms: float
    over_gemms: float
    peak_mib: float
    hidden: float | None = None


def make_inputs(size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    draw = torch.Generator(device).manual_seed(0)

    def normal(rows: int, width: int, spread: float) -> Tensor:
        full = torch.randn(rows, width, generator=draw, device=device, dtype=dtype)
        return full.mul_(spread)

    weight = normal(size.rows, size.student_width, size.student_width**-0.5)
    weight.requires_grad_().main_grad = torch.zeros(  # type: ignore[attr-defined]
        weight.shape, device=device, dtype=torch.float32
    )
    return Inputs(
        normal(size.positions, size.student_width, 2.0).requires_grad_(),
        weight,
        normal(size.positions, size.teacher_width, 2.0),
        normal(size.rows, size.teacher_width, size.teacher_width**-0.5),
        torch.full((size.positions,), 1 / size.positions, device=device),
        Workspace(),
    )


def ours(inputs: Inputs, divergence: str, group: dist.ProcessGroup | None = None) -> None:
    ranks = 1 if group is None else group.size()
    result = prefix_divergence(
        inputs.hidden,
        inputs.weight,
        inputs.teacher_hidden,
        inputs.teacher_weight,
        inputs.token_weight,
        divergence,
        BETA,
        vocab_size=inputs.weight.shape[0] * ranks,
        tp_group=group,
        workspace=inputs.workspace,
    )
    result.loss.backward()
    inputs.hidden.grad = inputs.weight.grad = None


@torch.no_grad()
def gemms(inputs: Inputs) -> None:
    """The four of each chunk, as the loss calls them, with its gradient in bf16."""
    shape = inputs.chunk, inputs.weight.shape[0]
    student, teacher = inputs.workspace.logits(2, shape, inputs.hidden.device)
    gradient = student.to(inputs.hidden.dtype)
    dh = torch.empty_like(inputs.hidden)
    main_grad: Tensor = inputs.weight.main_grad  # type: ignore[attr-defined]
    for at in range(0, inputs.hidden.shape[0], inputs.chunk):
        part = slice(at, at + inputs.chunk)
        hidden, rows = inputs.hidden[part], len(inputs.hidden[part])
        gemm.logits_into(student[:rows], hidden, inputs.weight)
        gemm.logits_into(teacher[:rows], inputs.teacher_hidden[part], inputs.teacher_weight)
        gemm.hidden_gradient_into(dh[part], gradient[:rows], inputs.weight)
        gemm.add_weight_gradient(main_grad, gradient[:rows], hidden)


def collectives(inputs: Inputs, divergence: str, group: dist.ProcessGroup) -> None:
    """Those of one call, by themselves."""
    per_token = [STATISTICS] + ([2] if divergence == "jsd" else [])
    for at in range(0, inputs.hidden.shape[0], inputs.chunk):
        part = inputs.hidden.detach()[at : at + inputs.chunk].clone()
        for count in per_token:
            own = part.new_zeros(len(part) * count, dtype=torch.float64)
            dist.all_gather_single(own.new_empty(own.numel() * group.size()), own, group=group)
        dist.all_reduce(part, group=group)


def liger(inputs: Inputs, divergence: str) -> None:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    shares = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": BETA}  # of the teacher, in its words
    head = LigerFusedLinearJSD(jsd_beta=shares[divergence], accum_dtype=torch.float32)
    heads = inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight
    head(*heads, None).backward()
    inputs.hidden.grad = inputs.weight.grad = None


def median_ms(call: Callable[[], None], device: torch.device, repeats: int) -> float:
    for _ in range(2):
        call()
    return statistics.median(_one_ms(call, device) for _ in range(repeats))


def _one_ms(call: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start_event.record()
    call()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event)


def peak_mib(call: Callable[[], None], device: torch.device) -> float:
    """Above what is allocated now; NaN on a CPU."""
    if device.type != "cuda":
        call()
        return float("nan")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(
    size: Size, device: torch.device, repeats: int, *, with_liger: bool, dtype: torch.dtype
) -> list[Row]:
    """On one rank."""
    inputs = make_inputs(size, device, dtype)
    floor = median_ms(lambda: gemms(inputs), device, repeats)
    rows = [Row("gemms", "", 1, size.positions, size.rows, floor, 1.0, 0.0)]
    methods: dict[str, Callable[[Inputs, str], None]] = {"ours": ours}
    if with_liger:
        methods["liger"] = liger
    for divergence in DIVERGENCES:
        for name, method in methods.items():
            fresh = make_inputs(size, device, dtype)  # its workspace counts for its peak
            peak = peak_mib(lambda m=method, i=fresh, d=divergence: m(i, d), device)
            ms = median_ms(lambda m=method, i=fresh, d=divergence: m(i, d), device, repeats)
            place = 1, size.positions, size.rows
            rows.append(Row(name, divergence, *place, ms, ms / floor, peak))
    return rows


def measure_ranks(
    size: Size, device: torch.device, repeats: int, *, dtype: torch.dtype
) -> list[Row]:
    """Over all ranks of the world; the same on every rank but for the noise of the clock."""
    group = dist.group.WORLD
    assert group is not None
    inputs = make_inputs(size, device, dtype)
    floor = median_ms(lambda: gemms(inputs), device, repeats)
    rows = []
    for divergence in DIVERGENCES:
        alone = median_ms(lambda d=divergence: ours(inputs, d), device, repeats)
        own = median_ms(lambda d=divergence: collectives(inputs, d, group), device, repeats)
        ms = median_ms(lambda d=divergence: ours(inputs, d, group), device, repeats)
        fresh = make_inputs(size, device, dtype)
        peak = peak_mib(lambda d=divergence, i=fresh: ours(i, d, group), device)
        place = group.size(), size.positions, size.rows
        rows.append(Row("ours", divergence, *place, ms, ms / floor, peak, 1 - (ms - alone) / own))
    return rows


def print_rows(rows: list[Row], title: str) -> None:
    table = Table(title=title)
    for name in asdict(rows[0]):
        table.add_column(name.replace("_", " "))
    for row in rows:
        cells = asdict(row).values()
        table.add_row(*(f"{c:.3f}" if isinstance(c, float) else str(c or "") for c in cells))
    Console(width=140).print(table)


def all_rows(device: torch.device, *, quick: bool) -> list[Row]:
    repeats, dtype = (5, torch.bfloat16) if quick else (20, torch.bfloat16)
    if dist.is_initialized() and dist.get_world_size() > 1:
        shard = Size(SHARD.positions, WHOLE.rows // dist.get_world_size())
        return measure_ranks(shard, device, repeats, dtype=dtype)
    there = importlib.util.find_spec("liger_kernel") is not None
    if not there:
        print("no row of Liger's: pip install --no-deps liger-kernel==0.8.5")
    rows = measure(SHARD, device, repeats, with_liger=False, dtype=dtype)
    whole = QUICK_WHOLE if quick else WHOLE
    return rows + measure(whole, device, repeats, with_liger=there, dtype=dtype)


def describe_machine() -> dict[str, str]:
    return {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer positions and repeats")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_loss.py needs an NVIDIA GPU and this machine has none: nothing was measured")
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl")
    rows = all_rows(device, quick=arguments.quick)
    if not dist.is_initialized() or dist.get_rank() == 0:
        machine = describe_machine()
        print_rows(rows, f"Divergence on {machine['card']}, bf16, medians")
        if arguments.json:
            told = {"machine": machine, "rows": [asdict(row) for row in rows]}
            arguments.json.write_text(json.dumps(told, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
