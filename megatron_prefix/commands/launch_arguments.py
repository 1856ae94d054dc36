"""The arguments of ``megatron-prefix launch``. Imports nothing heavy: ``--help`` is quick."""

import argparse
import os
from dataclasses import fields, replace
from typing import Any

from megatron_prefix.commands.command import add_recipe_arguments
from megatron_prefix.jobs.cluster import Cluster
from megatron_prefix.recipe import factory_beside
from megatron_prefix.secret_keys import names_a_secret

EXAMPLES = """\
examples:
  megatron-prefix launch quickstart                          here, through nemo-run
  megatron-prefix launch RECIPE --executor slurm --gpus-per-node 8 --partition gpu --dryrun
  megatron-prefix launch RECIPE --executor slurm --nodes 5 --server-nodes 1 --gpus-per-node 8 \\
      --account me --time 12:00:00 --env HF_HOME=/scratch/hf --detach
  megatron-prefix launch RECIPE --executor slurm --nodes 5 --server-nodes 1 --heterogeneous \\
      --gpus-per-node 8 --server-gpus-per-node 4
  megatron-prefix launch RECIPE --executor slurm --nodes 9 --server-nodes 1 --teacher-nodes 4 \\
      --gpus-per-node 8                       student on 4 nodes, teacher on 4, servers on 1
  megatron-prefix launch RECIPE --executor slurm --nodes 4 --server-nodes 1 \\
      --teacher-server-nodes 1 --gpus-per-node 8 teacher.placement=server
A recipe's file may have `def cluster() -> Cluster` with these settings; options win over it.
Afterwards: megatron-prefix status|logs|cancel runs/NAME.
"""


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Options left out are None: the recipe's ``cluster()`` or the defaults decide."""
    add_recipe_arguments(parser)
    parser.add_argument("--executor", choices=("local", "slurm"), help="default: local")
    parser.add_argument("--dryrun", action="store_true", help="print the scripts, write nothing")
    parser.add_argument(
        "--detach", action="store_true", help="return once it is submitted or started"
    )
    _add_sizes(parser.add_argument_group("sizes"))
    _add_words(parser.add_argument_group("slurm"))


def _add_sizes(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--nodes", type=int, metavar="N", help="of the job (default: 1)")
    group.add_argument("--server-nodes", type=int, metavar="N", help="those of them that serve")
    group.add_argument(
        "--teacher-nodes", type=int, metavar="N", help="those of the others that only teach"
    )
    group.add_argument(
        "--teacher-server-nodes",
        type=int,
        metavar="N",
        help="those that serve teachers with placement=server",
    )
    group.add_argument("--gpus-per-node", type=int, metavar="N")
    group.add_argument(
        "--heterogeneous",
        action="store_const",
        const=True,
        help="those that serve as groups of their own",
    )
    group.add_argument(
        "--server-gpus-per-node", type=int, metavar="N", help="of these groups (default: the same)"
    )
    group.add_argument("--ranks-per-node", type=int, metavar="N", help="default: one a GPU")
    group.add_argument("--max-restarts", type=int, metavar="N", help="of failed ranks, in place")


def _add_words(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--partition")
    group.add_argument("--account")
    group.add_argument("--time", metavar="HH:MM:SS", help="limit (default: 04:00:00)")
    group.add_argument(
        "--signal-before", type=int, dest="signal_before_s", metavar="S", help="default: 300"
    )
    group.add_argument(
        "--singleton", action="store_const", const=True, help="after this run's earlier jobs"
    )
    group.add_argument("--container", metavar="IMAGE", help="needs pyxis on the cluster")
    group.add_argument("--mount", action="append", dest="mounts", metavar="SRC:DST")
    group.add_argument("--env", action="append", metavar="NAME[=VALUE]", help="of the steps")
    group.add_argument("--module", action="append", dest="modules", metavar="NAME")
    group.add_argument("--python", metavar="PATH", help="default: this one")


def cluster_of(arguments: argparse.Namespace) -> Cluster:
    """The recipe's own cluster, with the options that were given over it.

    ``--env NAME`` takes the value that NAME has here, and the steps' scripts hold it; where NAME is
    called like a secret they refer to it instead: sbatch hands the whole environment on.
    """
    given: dict[str, Any] = {
        field.name: value
        for field in fields(Cluster)
        if (value := getattr(arguments, field.name)) is not None
    }
    for name in ("mounts", "modules"):
        if name in given:
            given[name] = tuple(given[name])
    if "env" in given:
        given["env"] = tuple(map(_variable, given["env"]))
    factory = factory_beside(arguments.recipe, "cluster")
    base = factory() if factory else Cluster()
    if not isinstance(base, Cluster):
        raise ValueError(f"cluster() of {arguments.recipe} returned no Cluster but {base!r}")
    return replace(base, **given)


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        raise ValueError(f"--env {name}: no such variable here; give {name}=value")
    if not equals and names_a_secret(name):
        return name, f"${{oc.env:{name}}}"
    return name, value if equals else os.environ[name]
