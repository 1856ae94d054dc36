"""Time and memory of the vocab-parallel divergence on one CPU thread, fp32.

    python benchmarks/kl_loss.py [--quick] [--json FILE]

Each row is one way to get the loss and both of its gradients; ``over_gemms`` divides its CPU
seconds by those of the four matrix products that any exact one-pass method must do. Peak memory is
above the inputs, both gradients included. Errors are against fp64.

| method | what it is |
|---|---|
| gemms | the four matrix products alone, into memory that is there already: no loss |
| one_pass | megatron_prefix.loss |
| in_training | the same, into a main_grad that is there already, with a Workspace that is kept |
| full_logits | whole logits, the divergence from log_softmax, autograd |
| saved_logits | the usual tensor-parallel loss: per-token all-reduces on whole, saved logits |
| liger | liger_kernel.chunked_loss at the one_pass chunk, uncompiled, where it is installed |
"""

import argparse
import ctypes
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.kl_methods import (
    DIVERGENCES,
    METHODS,
    Inputs,
    full_logits,
    make_inputs,
    methods_for,
)
from megatron_prefix.loss.task import CPU_LIMITS, chosen_chunk

QUICK_SIZES = ((1024, 8192), (128, 151936))
SIZES = ((1024, 8192), (2048, 8192), (1024, 32768), (128, 151936), (256, 151936))
ERRORS_UP_TO = 1 << 24  # logits; fp64 autograd on more needs gigabytes


@dataclass(frozen=True)
class Row:
    positions: int
    vocabulary: int
    divergence: str
    method: str
    seconds: float
    over_gemms: float
    peak_mib: float
    value_error: float | None = None
    dh_error: float | None = None
    dw_error: float | None = None


def seconds_of(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


class Gemms:
    """The floor: at the whole N and by chunks; the lesser time counts."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        positions, vocabulary = inputs.hidden.shape[0], inputs.weight.shape[0]
        self.student = torch.zeros(positions, vocabulary)
        self.teacher = torch.zeros(positions, vocabulary)
        self.dh, self.dw = torch.zeros_like(inputs.hidden), torch.zeros_like(inputs.weight)
        self.chunks = (positions, chosen_chunk(positions, 2 * vocabulary, CPU_LIMITS))

    def seconds(self) -> float:
        return min(seconds_of(lambda chunk=chunk: self.run(chunk)) for chunk in self.chunks)

    @torch.no_grad()
    def run(self, chunk: int) -> None:
        inputs = self.inputs
        for at in range(0, inputs.hidden.shape[0], chunk):
            hidden, teacher_hidden = (
                inputs.hidden[at : at + chunk],
                inputs.teacher_hidden[at:][:chunk],
            )
            student, teacher = self.student[: len(hidden)], self.teacher[: len(hidden)]
            torch.mm(hidden, inputs.weight.T, out=student)
            torch.mm(teacher_hidden, inputs.teacher_weight.T, out=teacher)
            torch.mm(student, inputs.weight, out=self.dh[at : at + chunk])
            torch.addmm(self.dw, student.T, hidden, beta=float(at > 0), out=self.dw)


def run_fresh(method: str, inputs: Inputs, divergence: str) -> Tensor:
    inputs.hidden.grad = inputs.weight.grad = None
    inputs.main_grad.zero_()
    return METHODS[method](inputs, divergence)


def measure_times(
    positions: int, vocabulary: int, repeats: int
) -> tuple[float, dict[tuple[str, str], float]]:
    """Least CPU seconds of the GEMMs and of each (divergence, method), taken in turns."""
    inputs = make_inputs(positions, vocabulary)
    gemms, floor = Gemms(inputs), float("inf")
    best: dict[tuple[str, str], float] = {}
    for _ in range(repeats + 1):
        floor = min(floor, gemms.seconds())
        for divergence in DIVERGENCES:
            for method in methods_for(divergence):
                took = seconds_of(lambda m=method, d=divergence: run_fresh(m, inputs, d))
                best[divergence, method] = min(best.get((divergence, method), took), took)
    return floor, best


def peak_mib(positions: int, vocabulary: int, divergence: str, method: str) -> float:
    """In a process of its own, whose heap holds nothing that was freed before."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, positions, vocabulary, divergence, method)
    child = context.Process(target=_send_peak, args=arguments)
    child.start()
    result = receiver.recv()
    child.join()
    return result


def _send_peak(sender, positions: int, vocabulary: int, divergence: str, method: str) -> None:
    torch.set_num_threads(1)
    inputs = make_inputs(positions, vocabulary)
    Gemms(inputs).run(positions)  # the BLAS's own work space stays
    run_fresh(method, make_inputs(4, 64), divergence)
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = status_mib("VmRSS")
    run_fresh(method, inputs, divergence)
    sender.send(status_mib("VmHWM") - before)


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def errors(positions: int, vocabulary: int, divergence: str, method: str) -> dict[str, float]:
    """Against fp64 autograd: norms of differences over norms."""
    if positions * vocabulary > ERRORS_UP_TO:
        return {}
    inputs = make_inputs(positions, vocabulary)
    exact = Inputs(
        inputs.hidden.detach().double().requires_grad_(),
        inputs.weight.detach().double().requires_grad_(),
        inputs.teacher_hidden.double(),
        inputs.teacher_weight.double(),
        inputs.token_weight.double(),
        inputs.main_grad,
        inputs.workspace,
    )
    loss, expected = run_fresh(method, inputs, divergence), full_logits(exact, divergence)
    got = inputs.main_grad if inputs.weight.grad is None else inputs.weight.grad
    return {
        "value_error": _error(loss, expected),
        "dh_error": _error(inputs.hidden.grad, exact.hidden.grad),
        "dw_error": _error(got, exact.weight.grad),
    }


def _error(value: Tensor, expected: Tensor) -> float:
    return float((value.detach().double() - expected.detach()).norm() / expected.detach().norm())


def rows_for(positions: int, vocabulary: int, repeats: int) -> list[Row]:
    size = positions, vocabulary
    pairs = [(d, m) for d in DIVERGENCES for m in methods_for(d)]
    peaks = {pair: peak_mib(*size, *pair) for pair in pairs}  # before this process's heap grows
    floor, seconds = measure_times(*size, repeats)
    rows = [Row(*size, "", "gemms", floor, 1.0, 0.0)]
    for pair in pairs:
        told = errors(*size, *pair)
        rows.append(Row(*size, *pair, seconds[pair], seconds[pair] / floor, peaks[pair], **told))
    return rows


def print_table(rows: list[Row]) -> None:
    table = Table(title="Divergence over the vocabulary: one CPU thread, fp32, d 256 and 384")
    names = list(asdict(rows[0]))
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*(_cell(value) for value in asdict(row).values()))
    Console(width=140).print(table)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two sizes, fewer repeats")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in QUICK_SIZES if arguments.quick else SIZES:
        rows += rows_for(*size, repeats=4 if arguments.quick else 8)
    print_table(rows)
    if arguments.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
        text = json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
