"""The arguments of ``megatron-prefix advise``. Imports nothing heavy: ``--help`` is quick."""

import argparse

POLICIES = ("anchored", "linear", "late", "fixed")
EXAMPLES = """\
examples:
  megatron-prefix advise runs/quickstart             from its probes, or its full-length steps
  megatron-prefix advise runs/quickstart --step 100  from what the student was like then
  megatron-prefix advise recipes/quickstart.py       makes a pilot first: full-length rollouts
                                                     that train nothing, in runs/quickstart-pilot
  megatron-prefix advise quickstart --share 0.9 --policy linear --json
Prints the signal (KL) that prefixes of each length hold, what they save, and a policy to paste.
"""


def add_advise_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN|RECIPE", help="a run's folder, or a recipe")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],  # argparse would call it required without one
        metavar="section.key=value",
        help="settings of a recipe's pilot",
    )
    parser.add_argument("--overlay", default="", metavar="FILE", help="a recipe's: a YAML file")
    parser.add_argument(
        "--share",
        type=float,
        default=0.0,
        help="of the signal, like 0.8; default: its knee",
    )
    parser.add_argument("--step", type=int, help="a run's: the probe after it, or steps after it")
    parser.add_argument("--pilot-steps", type=int, default=4, metavar="N", help="default: 4")
    parser.add_argument("--policy", default="", help=f"one of {', '.join(POLICIES)}")
    parser.add_argument("--output", metavar="DIR", help="of advice.png; default: the run")
    parser.add_argument("--json", action="store_true", help="the advice as one JSON object")
