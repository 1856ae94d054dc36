"""Says what is in a checkpoint: a Hugging Face folder, a run's, or one step's.

Family, parameters, layout, step, precision, sizes; of a Megatron checkpoint the checksums of all
files are verified, of a Hugging Face folder every header and every tensor's place in the family.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prefix.mcore.cpu import adapt_to_cpu

DAMAGED = 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--no-checksums", action="store_true", help="do not read whole files")
    return parser.parse_args(argv)


def work(args: argparse.Namespace) -> int:
    from megatron_prefix.mcore.contents import describe, find_contents

    find_contents(args.folder)
    adapt_to_cpu()  # before any import of Megatron, which says much
    found = describe(args.folder, checksums=not args.no_checksums)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        Console().print(table(args.folder, found))
    return DAMAGED if found.get("problems") else 0


def table(folder: Path, found: dict[str, Any]) -> Table:
    rows = Table(title=str(folder), show_header=False)
    for key, value in found.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{name} {number}" for name, number in value.items())
        elif isinstance(value, list):
            shown = "\n".join(value) or "none"
        elif isinstance(value, int) and not isinstance(value, bool):
            shown = f"{value:,}"
        else:
            shown = str(value)
        rows.add_row(key.replace("_", " "), shown)
    return rows


def main(argv: list[str] | None = None) -> int:
    from megatron_prefix.mcore.tool import run_tool

    args = parse_args(argv)
    return run_tool("inspect_checkpoint", lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
