"""Seconds by phase of a training step, and the share that is neither generation nor model compute.

Runs SORT-CHAIN through the real path (an SGLang server, Megatron ranks) in several layouts, prefix
lengths alternating in each run so that both see the same machine. Prints medians; asserts nothing.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_prefix.launcher import launch_local
from megatron_prefix.recipe import load_recipe
from megatron_prefix.rollout.server import start_server, wait_healthy
from megatron_prefix.tasks import sort_chain

LENGTHS = (9, 75)
WARM_UP = 4  # steps left out
LAYOUTS = {
    "TP1": ("student.tensor_model_parallel_size=1", "teacher.pipeline_model_parallel_size=1"),
    "TP2": ("student.tensor_model_parallel_size=2", "teacher.pipeline_model_parallel_size=2"),
    "PP2": (
        "student.tensor_model_parallel_size=1",
        "student.pipeline_model_parallel_size=2",
        "teacher.pipeline_model_parallel_size=1",
        "teacher.tensor_model_parallel_size=2",
    ),
}
COMPUTE = ("rollout", "teacher", "student", "optimizer")


@dataclass(frozen=True)
class Row:
    """Medians of one layout and prefix length, milliseconds."""

    layout: str
    prefix_length: int
    steps: int
    phases: dict[str, float]
    step: float
    overhead: float  # share of the step that is neither generation nor model compute


@contextlib.contextmanager
def server(folder: Path) -> Iterator[list[str]]:
    """One server for all runs; yields the overrides that make a run use it."""
    recipe = load_recipe("recipes/quickstart.py")
    started = start_server(
        recipe.student.hf_path, recipe.rollout, params_dtype="fp32", log_path=folder / "server.log"
    )
    try:
        wait_healthy([started], timeout_s=recipe.rollout.start_timeout_s)
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_text(started.endpoint.api_key)
        yield [f"rollout.server_urls=[{started.url}]", f"rollout.api_key_file={key}"]
    finally:
        started.stop()


def measure(layout: str, steps: int, folder: Path, reach_server: list[str]) -> list[Row]:
    overrides = [
        *LAYOUTS[layout],
        *reach_server,
        f"run.name={layout}",
        f"run.output_dir={folder}",
        f"train.steps={steps}",
        "optimizer.lr_warmup_steps=1",
        "prefix.policy=anchored",
        "prefix.anchored.every=2",
        "rollout.verify_weights_every=0",
        "checkpoint.export_hf=false",
        "eval.path=",
        "log.log_interval=1000",
    ]
    if launch_local(load_recipe("recipes/quickstart.py", overrides=overrides)):
        raise SystemExit(f"the run {layout} failed; its logs are in {folder / layout}")
    lines = (folder / layout / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][WARM_UP:]
    return [
        summarise(layout, length, [r["seconds"] for r in records if r["prefix_length"] == length])
        for length in LENGTHS
    ]


def summarise(layout: str, length: int, seconds: list[dict[str, float]]) -> Row:
    phases = {name: 1e3 * statistics.median(s[name] for s in seconds) for name in seconds[0]}
    overhead = statistics.median(
        1 - sum(s[name] for name in COMPUTE) / sum(s.values()) for s in seconds
    )
    step = 1e3 * statistics.median(sum(s.values()) for s in seconds)
    return Row(layout, length, len(seconds), phases, step, overhead)


def show(rows: list[Row]) -> None:
    table = Table(title="Milliseconds of a SORT-CHAIN step (medians, 32 rollouts)")
    phases = list(rows[0].phases)
    for name in ("layout", "L", "steps", *phases, "step", "overhead"):
        table.add_column(name, justify="left" if name == "layout" else "right")
    for row in rows:
        table.add_row(
            row.layout,
            str(row.prefix_length),
            str(row.steps),
            *(f"{row.phases[name]:.1f}" for name in phases),
            f"{row.step:.0f}",
            f"{row.overhead:.1%}",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="TP2 alone, fewer steps")
    parser.add_argument("--steps", type=int, default=0, help="of each run (64; --quick 24)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    steps = arguments.steps or (24 if arguments.quick else 64)
    sort_chain.prepare_data(".cache/sort_chain")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, server(Path(name)) as reach_server:
        for layout in ["TP2"] if arguments.quick else list(LAYOUTS):
            rows += measure(layout, steps, Path(name), reach_server)
    show(rows)
    if arguments.json:
        as_rows = [{**vars(row), **row.phases} for row in rows]
        arguments.json.write_text(json.dumps({"rows": as_rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
