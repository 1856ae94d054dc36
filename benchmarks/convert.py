"""How fast the converters are against a plain copy of the same files, and what memory they take.

Writes random bf16 Qwen3 folders of several sizes and turns each into a Megatron checkpoint and
back, every conversion in a process of its own, taking turns with a copy and with the verification
of the checkpoint's SHA-256 sums alone. GB/s are of the model's bytes; the converters also look for
values that are not finite, read back and compare and, to Megatron, hash.
The peak is what a process took beyond what it had before it began. Prints a table; asserts nothing.
"""

import argparse
import functools
import json
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
    what: str  # copy | to Megatron | SHA-256 alone | to Hugging Face
    ranks: int
    gb_per_s: float
    of_copy: float  # of the copy's rate
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
    for number, units in enumerate(job.files()):
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


def to_megatron(source: Path, output: Path, ranks: int) -> None:
    from megatron_prefix.mcore.conversion import Conversion
    from megatron_prefix.mcore.convert_to_megatron import hf_to_megatron
    from megatron_prefix.mcore.source import open_source

    _, hf = open_source(source)
    job = Conversion(hf, output, "bf16", ranks, shard_bytes=SHARD_MIB * 2**20)
    hf_to_megatron(job, lambda size: None)


def to_hugging_face(source: Path, output: Path, ranks: int) -> None:
    from megatron_prefix.mcore.contents import read_step
    from megatron_prefix.mcore.conversion import Conversion
    from megatron_prefix.mcore.convert_to_hf import megatron_to_hf
    from megatron_prefix.mcore.convert_to_megatron import STEP_FOLDER
    from megatron_prefix.mcore.source import open_config

    job = Conversion(
        open_config(source / "hf"), output, "bf16", ranks, shard_bytes=SHARD_MIB * 2**20
    )
    megatron_to_hf(job, read_step(source / STEP_FOLDER), lambda size: None)


def sums(source: Path) -> None:
    from megatron_prefix.mcore.contents import check_manifest
    from megatron_prefix.mcore.convert_to_megatron import STEP_FOLDER

    check_manifest(source / STEP_FOLDER)


def measured(work: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak MiB of ``work`` in a forked process."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, start = memory("VmRSS"), time.perf_counter()
        work()
        seconds, peak = time.perf_counter() - start, memory("VmHWM") - before
        sender.send((seconds, cpu_seconds(), peak))

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


def memory(field: str) -> float:
    """MiB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure(layers: int, rounds: int, ranks: int, folder: Path) -> list[Row]:
    source, megatron, back = (folder / name for name in ("model", "megatron", "back"))
    write_model(source, layers)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    works = {
        "copy": functools.partial(shutil.copytree, source, folder / "copy"),
        "to Megatron": functools.partial(to_megatron, source, megatron, ranks),
        "SHA-256 alone": functools.partial(sums, megatron),
        "to Hugging Face": functools.partial(to_hugging_face, megatron, back, ranks),
    }
    found: dict[str, list[tuple[float, float, float]]] = {what: [] for what in works}
    for _ in range(rounds):
        for what, work in works.items():
            found[what].append(measured(work))
        for name in ("copy", "megatron", "back"):
            shutil.rmtree(folder / name)
    shutil.rmtree(source)
    rates = {
        what: size / 1e9 / statistics.median(seconds for seconds, _, _ in runs)
        for what, runs in found.items()
    }
    return [
        Row(
            size / 2**30,
            what,
            ranks if what.startswith("to ") else 1,
            rates[what],
            rates[what] / rates["copy"],
            statistics.median(cpu for _, cpu, _ in runs) / (size / 1e9),
            statistics.median(peak for _, _, peak in runs),
        )
        for what, runs in found.items()
    ]


def show(rows: list[Row]) -> None:
    table = Table(title=f"Conversion of bf16 models in shards of {SHARD_MIB} MiB (medians)")
    for name in ("model GiB", "what", "processes", "GB/s", "of a copy", "CPU s/GB", "peak MiB"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for row in rows:
        table.add_row(
            f"{row.model_gib:.2f}",
            row.what,
            str(row.ranks),
            f"{row.gb_per_s:.2f}",
            f"{row.of_copy:.2f}",
            f"{row.cpu_s_per_gb:.2f}",
            f"{row.peak_mib:.0f}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small models, one round")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a conversion")
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
