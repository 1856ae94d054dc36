"""The arguments of ``megatron-prefix report``. Imports nothing heavy: ``--help`` is quick."""

import argparse
from collections.abc import Sequence
from pathlib import Path

EXAMPLES = """\
examples:
  megatron-prefix report runs/quickstart                 runs/quickstart/report/index.html
  megatron-prefix report runs/full runs/anchored         report/index.html, both runs in it
  megatron-prefix report runs/* --output compared
The page needs nothing beside itself; each of its pictures is written as PNG besides. A run that is
still going is shown as far as it got.
"""


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--output", metavar="DIR", help="default: RUN/report of one run, report of several"
    )


def output_of(runs: Sequence[Path], asked: str | None) -> Path:
    if asked:
        return Path(asked)
    return runs[0] / "report" if len(runs) == 1 else Path("report")
