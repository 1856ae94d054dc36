"""Runs the main job on this machine and shows what it did: ``make quickstart``.

Usage: tools/quickstart.py [section.key=value ...]      settings laid over recipes/quickstart.py
"""

import sys
import time
from pathlib import Path

from rich.console import Console

from megatron_prefix.cli import main as command
from megatron_prefix.exit_codes import BAD_INPUT, DONE, SAVED
from megatron_prefix.recipe import load_recipe
from megatron_prefix.report.figure import quickstart_figure
from megatron_prefix.report.tables import phase_table, summary_table
from megatron_prefix.run_files.history import load_run, summarise, write_summary
from megatron_prefix.tasks import sort_chain

RECIPE = "recipes/quickstart.py"


def main(overrides: list[str]) -> int:
    if {"-h", "--help"} & set(overrides):
        print(__doc__)
        return DONE
    console = Console()
    try:
        recipe = load_recipe(RECIPE, overrides=overrides)
    except ValueError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return BAD_INPUT
    folder = Path(recipe.run.output_dir, recipe.run.name)
    moved = move_aside(folder)
    if moved:
        console.print(f"an earlier run was moved from {folder} to {moved}")
    sort_chain.prepare_data(Path(recipe.data.path).parent)
    start = time.monotonic()
    code = command(["train", RECIPE, *overrides])
    if code == SAVED:
        again = " ".join([f".venv/bin/megatron-prefix train {RECIPE}", *overrides])
        console.print(f"saved in {folder}; go on with: {again}", soft_wrap=True)
    if code:
        return code
    show(folder, time.monotonic() - start, console)
    return 0


def move_aside(folder: Path) -> Path | None:
    """Renames ``folder`` to the first free ``folder.N``; None where there is no such folder."""
    if not folder.exists():
        return None
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(target)


def show(folder: Path, seconds: float, console: Console) -> None:
    """Writes the summary and the picture into ``folder``, and prints the tables."""
    history = load_run(folder)
    summary = summarise(history, seconds)
    write_summary(summary, folder / "summary.json")
    quickstart_figure(folder, folder / "quickstart.png")
    console.print(phase_table(history))
    console.print(summary_table(summary, "On-policy prefix distillation of SORT-CHAIN"))
    console.print(f"summary: {folder / 'summary.json'}\npicture: {folder / 'quickstart.png'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
