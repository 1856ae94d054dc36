"""How fast the converters are against a plain copy of the same files, and what memory they take.

Writes random bf16 Qwen3 folders of several sizes and turns each into a Megatron checkpoint and
back, every conversion in a process of its own, taking turns with a copy, with a copy that is
flushed to the disk as a conversion is, and with the verification of the checkpoint's sums alone.
GB/s are of the model's bytes; the converters also look for values that are not finite, read back,
compare and hash. The peak is the private memory that a conversion's processes took together beyond
what they began with, looked at every 20 ms. Each begins after a file of the model's size was
removed, for on a virtual machine memory that has been free for a while is slow to come back.
Prints a table; asserts nothing.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megatron_prefix.mcore.cpu import adapt_to_cpu

SHARD_MIB = 256
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Row:
    """Medians of one size and direction."""

    model_gib: float
    what: str  # copy | copy, flushed | to Megatron | sums alone | to Hugging Face
    processes: int
    gb_per_s: float
    of_copy: float  # of the copy's rate
    of_flushed: float  # of the rate of a copy that is flushed
    cpu_s_per_gb: float  # of all its threads and processes: other work on the machine counts less
    peak_mib: float


def write_model(folder: Path, layers: int) -> None:
    """Random weights, in shards."""
    from megatron_prefix.mcore.conversion import Conversion
    from megatron_prefix.mcore.convert_to_hf import Shapes
    from megatron_prefix.mcore.hf_map import read_hf_model
    from megatron_prefix.mcore.tensor_files import write_tensors

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    job = Conversion(read_hf_model(str(folder)), folder, "bf16", shard_bytes=SHARD_MIB * 2**20)
    for number, units in enumerate(job.files):
        shapes: Shapes = {
            name: (shape, torch.bfloat16)
            for unit in units
            for name, shape in zip(unit.hf_names, unit.hf_shapes, strict=True)
        }
        file = folder / f"model-{number:05d}.safetensors"
        write_tensors(file, shapes, random_tensors(shapes), lambda size: None)


def random_tensors(shapes: dict) -> Iterator[tuple[str, torch.Tensor]]:
    for name, (shape, dtype) in shapes.items():
        yield name, torch.randn(shape).to(dtype)


def copy(source: Path, output: Path) -> int:
    shutil.copytree(source, output)
    return 1


def copy_flushed(source: Path, output: Path) -> int:
    from megatron_prefix.mcore.folders import to_disk

    shutil.copytree(source, output)
    for path in (*output.iterdir(), output):
        to_disk(path)
    return 1


def to_megatron(source: Path, output: Path, ranks: int) -> int:
    """How many processes did it, as of all works."""
    from megatron_prefix.mcore.conversion import Conversion
    from megatron_prefix.mcore.convert_to_megatron import hf_to_megatron
    from megatron_prefix.mcore.source import open_source

    _, hf = open_source(source)
    job = Conversion(hf, output, "bf16", ranks, shard_bytes=SHARD_MIB * 2**20)
    hf_to_megatron(job, lambda size: None)
    return job.processes


def to_hugging_face(source: Path, output: Path, ranks: int) -> int:
    from megatron_prefix.mcore.contents import read_step
    from megatron_prefix.mcore.conversion import Conversion
    from megatron_prefix.mcore.convert_to_hf import megatron_to_hf
    from megatron_prefix.mcore.convert_to_megatron import STEP_FOLDER
    from megatron_prefix.mcore.source import open_config

    job = Conversion(
        open_config(source / "hf"), output, "bf16", ranks, shard_bytes=SHARD_MIB * 2**20
    )
    megatron_to_hf(job, read_step(source / STEP_FOLDER), lambda size: None)
    return job.processes


def sums(source: Path) -> int:
    from megatron_prefix.mcore.contents import check_manifest
    from megatron_prefix.mcore.convert_to_megatron import STEP_FOLDER

    check_manifest(source / STEP_FOLDER)
    return 1


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_seconds: float
    peak_mib: float
    processes: int


def measured(work: Callable[[], int]) -> Run:
    """``work`` in a forked process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        with memory_watched() as peak:
            start = time.perf_counter()
            processes = work()
            seconds = time.perf_counter() - start
        sender.send(Run(seconds, cpu_seconds(), peak[0], processes))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"a conversion ended with {process.exitcode}")
    return receiver.recv()


def cpu_seconds() -> float:
    """Of this process so far, and of those that it waited for."""
    used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


@contextlib.contextmanager
def memory_watched() -> Iterator[list[float]]:
    """The largest MiB so far, in a list of one, of what this process and its children together have
    beyond what it has now; a child begins with as much."""
    me, before, peak, ended = os.getpid(), private_mib(os.getpid()), [0.0], threading.Event()

    def watch() -> None:
        children = Path(f"/proc/{me}/task/{me}/children")
        while not ended.wait(0.02):
            pids = [me, *map(int, children.read_text().split())]
            peak[0] = max(peak[0], sum(max(0.0, private_mib(pid) - before) for pid in pids))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def private_mib(pid: int) -> float:
    try:
        _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    except OSError:  # it has ended
        return 0.0
    return (int(resident) - int(shared)) * resource.getpagesize() / 2**20


def free_as_much(folder: Path, size: int) -> None:
    """Memory for an output of ``size`` bytes and for work beside it, freed just now."""
    file = folder / "ballast"
    with file.open("wb") as opened:
        for _ in range(0, size * 5 // 4, 2**24):
            opened.write(bytes(2**24))
    file.unlink()


def measure(layers: int, rounds: int, ranks: int, folder: Path) -> list[Row]:
    source, megatron, back = (folder / name for name in ("model", "megatron", "back"))
    write_model(source, layers)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    works = {
        "copy": functools.partial(copy, source, folder / "copy"),
        "copy, flushed": functools.partial(copy_flushed, source, folder / "flushed"),
        "to Megatron": functools.partial(to_megatron, source, megatron, ranks),
        "sums alone": functools.partial(sums, megatron),
        "to Hugging Face": functools.partial(to_hugging_face, megatron, back, ranks),
    }
    found: dict[str, list[Run]] = {what: [] for what in works}
    for _ in range(rounds):
        for what, work in works.items():
            free_as_much(folder, size)
            found[what].append(measured(work))
            for name in ("copy", "flushed"):
                shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("megatron", "back"):
            shutil.rmtree(folder / name)
    shutil.rmtree(source)
    rates = {what: size / 1e9 / middle(r.seconds for r in runs) for what, runs in found.items()}
    return [
        Row(
            size / 2**30,
            what,
            runs[0].processes,
            rates[what],
            rates[what] / rates["copy"],
            rates[what] / rates["copy, flushed"],
            middle(run.cpu_seconds for run in runs) / (size / 1e9),
            middle(run.peak_mib for run in runs),
        )
        for what, runs in found.items()
    ]


def middle(values: Iterable[float]) -> float:
    return statistics.median(values)


def show(rows: list[Row]) -> None:
    table = Table(title=f"Conversion of bf16 models in shards of {SHARD_MIB} MiB (medians)")
    columns = ("model GiB", "what", "processes", "GB/s", "of a copy", "of one flushed")
    for name in (*columns, "CPU s/GB", "peak MiB"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        table.add_row(
            f"{row.model_gib:.2f}",
            row.what,
            str(row.processes),
            f"{row.gb_per_s:.2f}",
            f"{row.of_copy:.2f}",
            f"{row.of_flushed:.2f}",
            f"{row.cpu_s_per_gb:.2f}",
            f"{row.peak_mib:.0f}",
        )
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small models, one round")
    parser.add_argument(
        "--ranks", type=int, default=0, help="processes of a conversion (default: the tools' own)"
    )
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    adapt_to_cpu()  # before any import of Megatron
    # Imported once, before the forks.
    import megatron_prefix.mcore.convert_to_hf
    import megatron_prefix.mcore.convert_to_megatron  # noqa: F401

    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for layers in (2, 4) if arguments.quick else (4, 12, 28):
            rounds = 1 if arguments.quick else 3
            rows += measure(layers, rounds, arguments.ranks, Path(name))
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
