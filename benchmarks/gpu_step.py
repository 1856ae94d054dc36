"""Tokens a second and peak memory of a training step at real width, on one NVIDIA GPU.

    python benchmarks/gpu_step.py [--quick] [--fp8 RECIPE] [--json FILE]

A Qwen3 of hidden size 4096 and vocabulary 151,936 with random weights, as many layers as fit with
their gradients and Adam's moments, learns from a teacher of the same width: the teacher's forward,
the student's forward and backward with the divergence, the optimizer. No rollout server: prompts
and prefixes are drawn, of unlike lengths, and packed. ``--fp8``: blockwise, tensorwise or delayed.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

RECIPES = ("off", "blockwise", "tensorwise", "delayed")


def print_row(row: Any, title: str) -> None:
    table = Table("", "", title=title)
    for name, value in asdict(row).items():
        table.add_row(
            name.replace("_", " "),
            f"{value:,.3f}" if isinstance(value, float) else str(value),
        )
    Console().print(table)


def measure_here(fp8: str, *, quick: bool) -> Any:
    """On the first GPU, in a world of one rank."""
    # Megatron's imports need a GPU or the CPU adapter, and take seconds.
    from benchmarks._step_at_width import Load, Width, layers_that_fit, measure
    from megatron_prefix.mcore.groups import initialize_megatron

    torch.cuda.set_device(0)
    width = Width()
    layers = 2 if quick else layers_that_fit(torch.cuda.mem_get_info()[0], width)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
        initialize_megatron(1)
        place = Path(folder), width, layers, Load(), 5 if quick else 12
        row = measure(fp8, *place, torch.device("cuda", 0))
        dist.destroy_process_group()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two layers, fewer steps")
    parser.add_argument("--fp8", choices=RECIPES, default="off", help="of the student's trunk")
    parser.add_argument("--json", type=Path, help="write the row here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_step.py needs an NVIDIA GPU and this machine has none: nothing was measured")
        return
    row = measure_here(arguments.fp8, quick=arguments.quick)
    card = torch.cuda.get_device_name()
    print_row(row, f"A training step at real width on {card}")
    if arguments.json:
        machine = {"card": card, "torch": torch.__version__, "cuda": torch.version.cuda}
        told = {"machine": machine, "rows": [asdict(row)]}
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
