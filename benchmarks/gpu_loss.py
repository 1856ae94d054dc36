"""Time and memory of the vocab-parallel divergence on NVIDIA GPUs, bf16.

    python -m benchmarks.gpu_loss [--quick] [--json FILE]
    torchrun --nproc-per-node 8 -m benchmarks.gpu_loss      tensor parallel over the GPUs

Medians of CUDA events after a warm-up. Rows are shards of one size: N 16384, V 151936,
d_s 4096, d_t 7168; on one GPU the shard of one rank in eight (without its collectives), and the
whole vocabulary beside Liger's Triton kernel, where it is installed. ``over_gemms`` divides by
the four GEMMs alone at the same chunk; ``peak_mib`` is above the inputs and main_grad, and
``expected_mib`` what arithmetic says of it (``expected_bytes``). Over several GPUs ``hidden`` is
the share of the collectives' own time that does not show in the loss's.

Memory in MiB, by arithmetic (bf16; main_grad, logits fp32):

    rows       inputs  main_grad  chunk  logits  their gradient  dh   zeros of dW  all at once
    18,992       760        297   4096      593             148  192          148          934
    151,936     3616       2374   2048     2374             594  160         1187         3689

``dh`` is bf16, with a chunk of it in fp32; the zeros that autograd gets for the dW that went to
main_grad are made when the gradient of the logits is gone. Over ranks, two chunks are in flight.
Liger's at 151,936 rows: chunks of 512, five to seven fp32 tensors of 297, dW fp32 2374 and bf16
1187, so about 4 GiB. The largest row takes less than 12 GiB; all take a minute or two.
"""

import argparse
import functools
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks._card import Attempts, Cells, report
from megatron_prefix.loss import Workspace, gemm, prefix_divergence
from megatron_prefix.loss.gather import all_gather
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


def expected_bytes(size: Size, chunks_in_flight: int = 1) -> int:
    """What one call of ours needs at once on a GPU above bf16 inputs and main_grad: the logits,
    ``dh``, and the larger of the logits' gradient with a chunk of fp32 ``dh``, and dW's zeros."""
    chunk = chosen_chunk(size.positions, 2 * chunks_in_flight * size.rows, GPU_LIMITS)
    logits = 4 * 2 * chunks_in_flight * chunk * size.rows
    gradient = 2 * chunk * size.rows + 4 * chunk * size.student_width
    zeros = 2 * size.rows * size.student_width
    return logits + 2 * size.positions * size.student_width + max(gradient, zeros)


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [N, d_s], wants a gradient
    weight: Tensor  # [rows, d_s], wants a gradient, with a main_grad
    teacher_hidden: Tensor  # [N, d_t]
    teacher_weight: Tensor  # [rows, d_t]
    token_weight: Tensor  # fp32 [N]
    workspace: Workspace
    chunks_in_flight: int  # as over as many ranks as are measured

    @property
    def chunk(self) -> int:
        limits = GPU_LIMITS if self.hidden.is_cuda else CPU_LIMITS
        logits = 2 * self.chunks_in_flight * self.weight.shape[0]
        return chosen_chunk(self.hidden.shape[0], logits, limits)


def make_inputs(
    size: Size,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
    chunks_in_flight: int = 1,
) -> Inputs:
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
        chunks_in_flight,
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


def gradient_of_logits(inputs: Inputs) -> Tensor:
    """[C, V] like a chunk's, for the GEMMs to work on; random, for zeros would cost less power."""
    shape, device = (inputs.chunk, inputs.weight.shape[0]), inputs.hidden.device
    return torch.randn(shape, device=device, dtype=inputs.hidden.dtype).mul_(1e-3)


@torch.no_grad()
def gemms(inputs: Inputs, gradient: Tensor) -> None:
    """The four of each chunk, as the loss calls them."""
    student, teacher = inputs.workspace.logits(2, (*gradient.shape,), inputs.hidden.device)
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
            all_gather(own, group)
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


@dataclass(frozen=True)
class Bench:
    """Where and how often; rows are dictionaries, for one that failed has an error and no time."""

    size: Size
    device: torch.device
    repeats: int
    dtype: torch.dtype = torch.bfloat16
    group: dist.ProcessGroup | None = None

    @property
    def chunks_in_flight(self) -> int:
        return 1 if self.group is None else 2

    def inputs(self) -> Inputs:
        return make_inputs(self.size, self.device, self.dtype, self.chunks_in_flight)

    def median(self, call: Callable[[], None]) -> float:
        return median_ms(call, self.device, self.repeats)

    def floor(self) -> Cells:
        inputs = self.inputs()
        gradient = gradient_of_logits(inputs)
        return {"ms": self.median(lambda: gemms(inputs, gradient)), "over_gemms": 1.0}

    def row(self, method: Callable[[Inputs], None], floor: object) -> Cells:
        """On fresh inputs: their workspace counts for the peak."""
        inputs = self.inputs()
        peak = peak_mib(lambda: method(inputs), self.device)
        ms = self.median(lambda: method(inputs))
        over = ms / floor if isinstance(floor, float) else None
        return {"ms": ms, "over_gemms": over, "peak_mib": peak}

    def hidden(self, divergence: str, ms: object) -> Cells:
        """Beside the loss of one rank and the collectives, each alone."""
        assert self.group is not None and isinstance(ms, float)
        inputs, group = self.inputs(), self.group
        alone = self.median(lambda: ours(inputs, divergence))
        own = self.median(lambda: collectives(inputs, divergence, group))
        return {"hidden": 1 - (ms - alone) / own}

    def label(self, method: str, divergence: str = "") -> dict[str, object]:
        ranks = 1 if self.group is None else self.group.size()
        place = {"ranks": ranks, "positions": self.size.positions, "rows": self.size.rows}
        return {"method": method, "divergence": divergence, **place}


def measure(bench: Bench, attempts: Attempts, *, with_liger: bool = False) -> list[Cells]:
    """Over all ranks of ``bench.group``, or on one. Each row by itself, inputs and all."""
    floor = attempts.measure(bench.floor)
    rows: list[Cells] = [bench.label("gemms") | floor]
    methods: dict[str, Callable[[Inputs, str], None]] = {
        "ours": lambda inputs, divergence: ours(inputs, divergence, bench.group)
    }
    if with_liger:
        methods["liger"] = liger
    expected = expected_bytes(bench.size, bench.chunks_in_flight) / 2**20
    for divergence in DIVERGENCES:
        for name, method in methods.items():
            call = functools.partial(_call, method, divergence)
            row = attempts.measure(functools.partial(bench.row, call, floor.get("ms")))
            if name == "ours":
                row = {**row, "expected_mib": expected}
            if bench.group is not None and "ms" in row:
                share = functools.partial(bench.hidden, divergence, row["ms"])
                row = {**row, **attempts.measure(share)}
            rows.append(bench.label(name, divergence) | row)
            print(".", end="", file=sys.stderr, flush=True)
    return rows


def _call(method: Callable[[Inputs, str], None], divergence: str, inputs: Inputs) -> None:
    method(inputs, divergence)


def all_rows(device: torch.device, attempts: Attempts, *, quick: bool) -> list[Cells]:
    repeats = 5 if quick else 20
    if dist.is_initialized():
        shard = Size(SHARD.positions, WHOLE.rows // dist.get_world_size())
        return measure(Bench(shard, device, repeats, group=dist.group.WORLD), attempts)
    there = importlib.util.find_spec("liger_kernel") is not None
    if not there:
        print("no row of Liger's: pip install --no-deps liger-kernel==0.8.5")
    rows = measure(Bench(SHARD, device, repeats), attempts)
    whole = QUICK_WHOLE if quick else WHOLE
    return rows + measure(Bench(whole, device, repeats), attempts, with_liger=there)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer positions and repeats")
    parser.add_argument("--json", type=Path, help="write machine and rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_loss.py needs an NVIDIA GPU and this machine has none: nothing was measured")
        return
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # A rank that fails leaves the others in a collective: not for NCCL's ten minutes.
        dist.init_process_group("nccl", timeout=timedelta(minutes=2))
    attempts = Attempts()
    rows = all_rows(device, attempts, quick=arguments.quick)
    if not dist.is_initialized() or dist.get_rank() == 0:
        report("Divergence in bf16, medians", rows, arguments.json)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(1 if attempts.failed else 0)


if __name__ == "__main__":
    main()
