"""Time, memory and error of the vocab-parallel divergence on one CPU thread, fp32.

    python benchmarks/kl_loss.py [--quick] [--json FILE]

Each row is one way to get the loss and both of its gradients; ``over_gemms`` divides its CPU
seconds by those of the four matrix products that any exact one-pass method must do (medians of
ratios within a round, so that a busy machine slows both). What an optimizer does once a step,
zeroing main_grad and dropping the last gradients, is nobody's time. Peak memory is above the
inputs, both gradients included. Errors are against fp64. Last comes the table of
docs/performance.md, as markdown.

| method | what it is |
|---|---|
| gemms | the four matrix products alone, into memory that is there already: no loss |
| gemms_chunked | the same at the one_pass chunk, which any method of as little memory must bear |
| one_pass | megatron_prefix.loss |
| in_training | the same, into a main_grad that is there already, with a Workspace that is kept |
| full_logits | whole logits, the divergence from log_softmax, autograd |
| saved_logits | the usual tensor-parallel loss: per-token all-reduces on whole, saved logits |
| liger | liger_kernel.chunked_loss at the one_pass chunk, uncompiled, where it is installed |
"""

import argparse
import ctypes
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._kl_checks import Exact, error_rows, tensor_parallel_row
from benchmarks._kl_methods import (
    D_STUDENT,
    DIVERGENCES,
    METHODS,
    Inputs,
    forget_gradients,
    make_inputs,
    methods_for,
    run_fresh,
)
from megatron_prefix.loss.task import CPU_LIMITS, chosen_chunk

# Positions, vocabulary, rounds.
QUICK_SIZES = ((512, 8192, 3), (64, 151936, 1))
SIZES = ((1024, 8192, 7), (2048, 8192, 5), (1024, 32768, 5), (128, 151936, 5), (256, 151936, 3))
ERRORS_UP_TO = 1 << 24  # logits; fp64 autograd on more needs gigabytes
LIGER = "liger-kernel==0.8.5"


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
    """The floor: at the whole N and by chunks; as the floor counts the lesser time."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        positions, vocabulary = inputs.hidden.shape[0], inputs.weight.shape[0]
        self.student = torch.zeros(positions, vocabulary)
        self.teacher = torch.zeros(positions, vocabulary)
        self.dh, self.dw = torch.zeros_like(inputs.hidden), torch.zeros_like(inputs.weight)
        self.chunk = chosen_chunk(positions, 2 * vocabulary, CPU_LIMITS)

    def seconds(self) -> tuple[float, float]:
        """The floor's, and those at the one_pass chunk."""
        whole, chunked = (
            seconds_of(lambda c=c: self.run(c)) for c in (len(self.student), self.chunk)
        )
        return min(whole, chunked), chunked

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


def measure_times(
    inputs: Inputs, gemms: Gemms, rounds: int
) -> tuple[float, dict[tuple[str, str], tuple[float, float]]]:
    """Least CPU seconds of the GEMMs; of each (divergence, method), taken in turns, and of the
    chunked GEMMs ("", "gemms_chunked"), the least seconds and the median of their ratio to the
    round's GEMMs."""
    floors: list[float] = []
    taken: dict[tuple[str, str], list[float]] = {}
    run_fresh("in_training", inputs, "jsd")  # what a run keeps, it has by its second step
    for _ in range(rounds):
        floor, chunked = gemms.seconds()
        floors.append(floor)
        taken.setdefault(("", "gemms_chunked"), []).append(chunked)
        for divergence in DIVERGENCES:
            for method in methods_for():
                forget_gradients(inputs)
                took = seconds_of(lambda m=method, d=divergence: METHODS[m](inputs, d))
                taken.setdefault((divergence, method), []).append(took)
    ratios = {
        pair: (min(times), statistics.median(t / f for t, f in zip(times, floors, strict=True)))
        for pair, times in taken.items()
    }
    return min(floors), ratios


def peak_mib(inputs: Inputs, divergence: str, method: str) -> float:
    """In a process of its own, which shares the inputs and has given back what was freed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_peak, args=(sender, inputs, divergence, method))
    child.start()
    result = receiver.recv()
    child.join()
    return result


def _send_peak(sender, inputs: Inputs, divergence: str, method: str) -> None:
    run_fresh(method, make_inputs(4, 64), divergence)
    inputs.main_grad.zero_()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
    before = status_mib("VmRSS")
    run_fresh(method, inputs, divergence)
    sender.send(status_mib("VmHWM") - before)


def status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def rows_for(positions: int, vocabulary: int, rounds: int) -> list[Row]:
    size = positions, vocabulary
    inputs = make_inputs(*size)
    gemms = Gemms(inputs)
    gemms.run(positions)  # the BLAS's own work space stays, in the children too
    pairs = [(d, m) for d in DIVERGENCES for m in methods_for()]
    peaks = {pair: peak_mib(inputs, *pair) for pair in pairs}  # before this process's heap grows
    floor, times = measure_times(inputs, gemms, rounds)
    chunked = times["", "gemms_chunked"]
    rows = [
        Row(*size, "", "gemms", floor, 1.0, 0.0),
        Row(*size, "", "gemms_chunked", *chunked, 0.0),
    ]
    for divergence in DIVERGENCES:
        fits = positions * vocabulary <= ERRORS_UP_TO
        exact = Exact.of(inputs, divergence) if fits else None
        for method in methods_for():
            pair = divergence, method
            told = exact.errors(inputs, *pair) if exact else ()
            rows.append(Row(*size, *pair, *times[pair], peaks[pair], *told))
    return rows


@dataclass(frozen=True)
class Against:
    """How many times ``one_pass`` is faster and smaller; ``in_training`` over the GEMMs."""

    positions: int
    vocabulary: int
    divergence: str
    in_training_over_gemms: float
    one_pass_over_gemms: float
    gemms_chunked_over_gemms: float
    one_pass_peak: float  # MiB
    full_logits_time: float
    full_logits_peak: float
    saved_logits_time: float
    saved_logits_peak: float
    liger_time: float | None
    liger_peak: float | None
    doubled: float | None  # peak at twice the positions, less the larger dh, over the peak


def compare(rows: list[Row]) -> list[Against]:
    found = {(r.positions, r.vocabulary, r.divergence, r.method): r for r in rows}
    result = []
    for (positions, vocabulary, divergence, method), own in found.items():
        if method != "one_pass":
            continue
        key = positions, vocabulary, divergence
        others = (found.get((*key, name)) for name in ("full_logits", "saved_logits", "liger"))
        ratios: list[float | None] = []
        for other in others:
            ratios.append(other.over_gemms / own.over_gemms if other else None)
            ratios.append(other.peak_mib / own.peak_mib if other else None)
        double, doubled = found.get((2 * positions, vocabulary, divergence, method)), None
        if double is not None:
            doubled = (double.peak_mib - positions * D_STUDENT * 4 / 2**20) / own.peak_mib
        trained = found[*key, "in_training"].over_gemms
        chunked = found[positions, vocabulary, "", "gemms_chunked"].over_gemms
        over = trained, own.over_gemms, chunked
        result.append(Against(*key, *over, own.peak_mib, *ratios, doubled))
    return result


def print_table(title: str, rows: list) -> None:
    table = Table(title=title)
    for name in asdict(rows[0]):
        table.add_column(name.replace("_", " "))
    for row in rows:
        table.add_row(*(_cell(value) for value in asdict(row).values()))
    Console(width=160).print(table)


def markdown(rows: list[Against]) -> str:
    """The table of docs/performance.md."""
    heads = (
        "N x V",
        "divergence",
        "`in_training` / GEMMs",
        "`one_pass` / GEMMs",
        "GEMMs by chunk / GEMMs",
        "peak MiB, `one_pass`",
        "full logits: slower, larger",
        "saved logits",
        "Liger",
        "peak at 2N",
    )
    lines = [heads, ("---",) * len(heads)]
    for row in rows:
        over = row.in_training_over_gemms, row.one_pass_over_gemms, row.gemms_chunked_over_gemms
        lines.append(
            (
                f"{row.positions} x {row.vocabulary}",
                row.divergence,
                *(f"{ratio:.2f}" for ratio in over),
                f"{row.one_pass_peak:.0f}",
                _times(row.full_logits_time, row.full_logits_peak),
                _times(row.saved_logits_time, row.saved_logits_peak),
                _times(row.liger_time, row.liger_peak),
                "" if row.doubled is None else f"dh + {100 * (row.doubled - 1):.1f}%",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _times(slower: float | None, larger: float | None) -> str:
    return "" if slower is None or larger is None else f"{slower:.2f}x, {larger:.1f}x"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small sizes, fewer rounds")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if importlib.util.find_spec("liger_kernel") is None:
        print(
            f"no row of Liger's: .tools/bin/uv pip install --no-deps --python .venv/bin/python "
            f"{LIGER} installs it"
        )
    for method in methods_for():  # imports and first calls are no part of a time or a peak
        run_fresh(method, make_inputs(4, 64), "jsd")
    rows: list[Row] = []
    for size in QUICK_SIZES if arguments.quick else SIZES:
        rows += rows_for(*size)
    against = compare(rows)
    exact = [row for d in DIVERGENCES for spread in (2.0, 30.0) for row in error_rows(d, spread)]
    exact += [tensor_parallel_row(d, ranks) for d in DIVERGENCES for ranks in (2, 4)]
    print_table("Divergence over the vocabulary: one CPU thread, fp32, d 256 and 384", rows)
    print_table("one_pass: times faster and smaller", against)
    print_table("Errors: of fp64, and of several ranks against one", exact)
    print(f"{_processor()}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} at the end\n")
    print(markdown(against))
    if arguments.json:
        machine = {"processor": _processor(), "torch": torch.__version__}
        tables = {"rows": rows, "against": against, "exact": exact}
        found = {name: [asdict(row) for row in table] for name, table in tables.items()}
        text = json.dumps({"machine": machine, **found}, indent=1)
        arguments.json.write_text(text + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    return next(named, platform.machine())


if __name__ == "__main__":
    main()
