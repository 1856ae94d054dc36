"""What the conversion scripts share: arguments, errors in one line, output that is not lost."""

import argparse
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_prefix.mcore.folders import leftovers

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130  # as a shell says of SIGINT


def run_tool(name: str, work: Callable[[], int], *, writes: bool = False) -> int:
    """The exit code of ``work``; a ValueError is the user's and is said in one line, as is what a
    disk refuses, what reads back otherwise, a process that died, and an end by Ctrl-C or SIGTERM.
    Of torchrun's ranks, which fail alike, the first one speaks. ``writes``: there is an output."""
    kept = "; nothing of the output was replaced" if writes else ""
    with _sigterm_is_ctrl_c():
        try:
            return work()
        except ValueError as error:
            return _say(f"{name}: error: {error}", BAD_INPUT)
        except (OSError, RuntimeError) as error:
            return _say(f"{name}: error: {' '.join(str(error).split())}{kept}", FAILED)
        except KeyboardInterrupt:
            return _say(f"{name}: interrupted{kept}", INTERRUPTED)


def _say(line: str, code: int) -> int:
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)
    return code


@contextlib.contextmanager
def _sigterm_is_ctrl_c() -> Iterator[None]:
    """So that it unwinds too: what was half written is removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def done(args: argparse.Namespace, what: str, rank: int) -> None:
    """The last line of a script that writes a folder, said once."""
    if rank == 0:
        print(f"{'would write' if args.dry_run else 'wrote'} {args.output}: {what}")


def tool_parser(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """What every script has that writes a folder."""
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--ranks",
        type=int,
        default=0,
        help="processes on this machine that share the files (default: one a core, at most 8, no "
        "more than there are files, each of up to 4 GiB, and fewer where together they would hold "
        "more than about 8 GiB); on several machines start this script by torchrun instead, with "
        "OUTPUT on a disk that all of them see",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT once whole")
    parser.add_argument("--dry-run", action="store_true", help="check everything, write nothing")


def check_output(output: Path, *inputs: Path | None, overwrite: bool) -> None:
    """Says what a killed run left; ValueError where ``output`` would be replaced unasked, which
    without ``overwrite`` it never is, or would take one of ``inputs`` along."""
    place = output.resolve()
    for source in (path.resolve() for path in inputs if path is not None):
        if place == source or place in source.parents or source in place.parents:
            raise ValueError(
                f"--output {output} is, holds or lies in the input {source}; name another folder"
            )
    for name in leftovers(output):
        print(f"found {name} of a run that did not end; it will be cleared", file=sys.stderr)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; name a folder")
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"--output {output} is there already; name another or add --overwrite")


def check_room(output: Path, size: int) -> None:
    """ValueError where the disk of ``output`` has no room for ``size`` bytes more."""
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"--output {output} needs {gib(size)} and its disk has {gib(free)} free; name another"
        )


def gib(size: float) -> str:
    return f"{size / 2**30:,.3f} GiB"


def check_ranks(ranks: int, torchrun_ranks: int = 1) -> None:
    if ranks < 0:
        raise ValueError(f"--ranks {ranks} must be 1 or more; leave it out for one a core")
    if ranks > 1 and torchrun_ranks > 1:
        raise ValueError(
            f"--ranks {ranks} under torchrun with {torchrun_ranks} processes; leave --ranks out, "
            "or torchrun"
        )
