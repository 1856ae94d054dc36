"""How long a save holds the training loop up, asynchronous against synchronous.

One rank, gloo, a random Qwen3 of some ten million parameters with Adam's state; no rollouts, no
teacher: a "step" is a pause in which the loop would compute. Both kinds of save take turns in one
process, each to its end. Prints medians; asserts nothing.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import transformers
from rich.console import Console
from rich.table import Table

from megatron_prefix.config import CheckpointConfig, ModelConfig, OptimizerConfig
from megatron_prefix.layout import model_layout
from megatron_prefix.mcore.cpu import adapt_to_cpu
from megatron_prefix.worker import keep_out_of_collections

if TYPE_CHECKING:
    from megatron_prefix.mcore.checkpoint import Checkpointer

STEP_S = 0.1


@dataclass(frozen=True)
class Row:
    """One save, seconds."""

    save: str  # asynchronous | synchronous
    pause_s: float  # that the loop stood still, in all
    whole_after_s: float  # from the start of the save


def write_model(folder: Path, layers: int) -> Path:
    config = transformers.Qwen3Config(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        tie_word_embeddings=True,
    )
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def measure(folder: Path, model: Path, saves: int) -> tuple[list[Row], int]:
    """Rows, and the bytes of one checkpoint."""
    from megatron_prefix.mcore.checkpoint import Checkpointer
    from megatron_prefix.mcore.groups import build_groups, initialize_megatron
    from megatron_prefix.mcore.hf_map import read_hf_model
    from megatron_prefix.mcore.model import build_model
    from megatron_prefix.mcore.optimizer import make_trainable
    from megatron_prefix.mcore.step_folders import saved_steps
    from megatron_prefix.mcore.weights import load_hf_weights

    initialize_megatron(0)
    config = ModelConfig(hf_path=str(model), params_dtype="fp32")
    groups = build_groups(model_layout(config, 1))
    student = build_model(
        config, read_hf_model(str(model)), groups, owner="student", with_head=True
    )
    load_hf_weights(student)
    trainable = make_trainable(student, OptimizerConfig(), 100)
    trainable.update()  # Adam's moments are made by the first one
    keep_out_of_collections()
    settings = CheckpointConfig(keep_last=1)
    savers = {
        kind: Checkpointer(folder / kind, trainable, replace(settings, async_save=asynchronous))
        for kind, asynchronous in (("asynchronous", True), ("synchronous", False))
    }
    rows = []
    for step in range(1, saves + 2):  # the first of each is left out
        rows += [one_save(kind, saver, folder / kind, step) for kind, saver in savers.items()]
    (last,) = saved_steps(folder / "synchronous")
    return rows[2:], sum(file.stat().st_size for file in last.iterdir())


def one_save(kind: str, saver: "Checkpointer", folder: Path, step: int) -> Row:
    from megatron_prefix.mcore.step_folders import step_folder

    start = time.perf_counter()
    saver.save(step, {"layout": saver.layout_record()})
    pause = time.perf_counter() - start
    while not step_folder(folder, step).exists():
        time.sleep(STEP_S)
        resumed = time.perf_counter()
        saver.finalize()
        pause += time.perf_counter() - resumed
    return Row(kind, pause, time.perf_counter() - start)


def show(rows: list[Row], size: int) -> dict[str, float]:
    kinds = ("asynchronous", "synchronous")
    pauses = {k: statistics.median(r.pause_s for r in rows if r.save == k) for k in kinds}
    wholes = {k: statistics.median(r.whole_after_s for r in rows if r.save == k) for k in kinds}
    table = Table(title=f"A checkpoint of {size / 2**20:.0f} MiB, medians")
    for name in ("save", "saves", "loop stands still, s", "whole after, s"):
        table.add_column(name, justify="left" if name == "save" else "right")
    for kind in kinds:
        count = sum(row.save == kind for row in rows)
        table.add_row(kind, str(count), f"{pauses[kind]:.3f}", f"{wholes[kind]:.3f}")
    Console(width=120).print(table)
    ratio = pauses["synchronous"] / pauses["asynchronous"]
    print(f"the synchronous save holds the loop up {ratio:.1f} times as long")
    return {f"{kind}_pause_s": pause for kind, pause in pauses.items()} | {"ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer saves")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    adapt_to_cpu()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = dist.FileStore(str(folder / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        model = write_model(folder / "model", 4 if arguments.quick else 16)
        rows, size = measure(folder, model, 5 if arguments.quick else 9)
        found = show(rows, size)
        dist.destroy_process_group()
    if arguments.json:
        record = {**found, "bytes": size, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
