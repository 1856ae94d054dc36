"""Tokens a second and peak memory of a training step at real width, on one NVIDIA GPU.

    python -m benchmarks.gpu_step [--quick] [--fp8 RECIPE ...] [--json FILE]

A Qwen3 of hidden size 4096 and vocabulary 151,936 with random weights learns from a teacher of the
same width and a quarter of its layers: the teacher's forward, the student's forward and backward
with the divergence, the optimizer. No rollout server: prompts and prefixes are drawn, of unlike
lengths, and packed. A row a recipe of the student's trunk: off, blockwise, tensorwise, delayed.

As many layers as fit with their gradients and Adam's moments, chosen once, from the memory that is
free: in GB, 30 and 5.1 a layer (_step_at_width.py has the parts), so 20 layers of 139 GiB, 9 of
80. Building the models takes longer than the steps; all four rows take a few minutes.
"""

import argparse
import functools
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks._card import Attempts, Cells, report

RECIPES = ("off", "blockwise", "tensorwise", "delayed")
QUICK_LAYERS = 4  # the first and the last stay in bf16


def measure_recipe(fp8: str, layers: int, *, quick: bool) -> Cells:
    """In a world of one rank that is there already, on its GPU."""
    from benchmarks._step_at_width import Load, Width, measure

    steps, device = 5 if quick else 12, torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as folder:
        return asdict(measure(fp8, Path(folder), Width(), layers, Load(), steps, device))


def measure_all(recipes: list[str], attempts: Attempts, *, quick: bool) -> list[Cells]:
    """On the first GPU, in a world of one rank."""
    # Megatron's imports need a GPU or the CPU adapter, and take seconds.
    from benchmarks._step_at_width import Load, Width, layers_that_fit
    from megatron_prefix.mcore.groups import initialize_megatron

    torch.cuda.set_device(0)
    layers = layers_that_fit(torch.cuda.mem_get_info()[0], Width(), Load())
    layers = min(layers, QUICK_LAYERS) if quick else layers
    rows: list[Cells] = []
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group("nccl", init_method=store, rank=0, world_size=1)
        initialize_megatron(1)
        for fp8 in recipes:
            row = attempts.measure(functools.partial(measure_recipe, fp8, layers, quick=quick))
            rows.append({"fp8": fp8, "layers": layers, **row})
        dist.destroy_process_group()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="four layers at most, fewer steps")
    parser.add_argument(
        "--fp8", choices=RECIPES, nargs="+", default=list(RECIPES), help="these rows alone"
    )
    parser.add_argument("--json", type=Path, help="write machine and rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_step.py needs an NVIDIA GPU and this machine has none: nothing was measured")
        return
    attempts = Attempts()
    rows = measure_all(arguments.fp8, attempts, quick=arguments.quick)
    report("A training step at real width", rows, arguments.json)
    sys.exit(1 if attempts.failed else 0)


if __name__ == "__main__":
    main()
