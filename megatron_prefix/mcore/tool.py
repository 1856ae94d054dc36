"""What the conversion scripts share: errors in one line, output that is not lost by mistake."""

import sys
from collections.abc import Callable
from pathlib import Path

from megatron_prefix.exit_codes import BAD_INPUT
from megatron_prefix.mcore.folders import leftovers


def run_tool(name: str, work: Callable[[], int]) -> int:
    """The exit code of ``work``; a ValueError is the user's and is said in one line."""
    try:
        return work()
    except ValueError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return BAD_INPUT


def check_output(output: Path, *, overwrite: bool) -> None:
    """Says what a killed run left; ValueError where ``output`` would be replaced unasked, which
    without ``overwrite`` it never is."""
    for name in leftovers(output):
        print(f"found {name} of a run that did not end; it will be cleared", file=sys.stderr)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"--output {output} is there already; name another or add --overwrite")


def gib(size: float) -> str:
    return f"{size / 2**30:,.3f} GiB"


def check_ranks(ranks: int, num_layers: int) -> None:
    if not 1 <= ranks <= num_layers:
        raise ValueError(f"--ranks {ranks} must be from 1 to {num_layers}, the layers to share")
