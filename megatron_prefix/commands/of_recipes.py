"""``megatron-prefix train``, ``plan``, ``launch`` and ``prepare``: what is done with a recipe.

Each checks in this order: settings, run folder, layouts and model folders, this machine, data sets.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from megatron_prefix.commands.command import ABOUT_RECIPES, Command, add_recipe_arguments
from megatron_prefix.commands.launch_arguments import EXAMPLES as LAUNCH_EXAMPLES
from megatron_prefix.commands.launch_arguments import add_launch_arguments
from megatron_prefix.config import Recipe
from megatron_prefix.exit_codes import DONE

TRAIN_EXAMPLES = """\
examples:
  megatron-prefix train recipes/quickstart.py
  megatron-prefix train quickstart run.name=short prefix.policy=fixed prefix.min_length=9
  megatron-prefix train quickstart --overlay cluster.yaml optimizer.lr=1e-4
  megatron-prefix train runs/short/recipe.yaml run.name=again      the same settings once more
Ctrl-C or SIGTERM saves and ends with exit code 75; run the same command again to resume. A second
one kills.
"""
PLAN_EXAMPLES = """\
examples:
  megatron-prefix plan recipes/quickstart.py
  megatron-prefix plan quickstart student.tensor_model_parallel_size=4 train.micro_batch_size=16
  megatron-prefix plan quickstart --json | jq .cost.run.ratio
  megatron-prefix plan qwen3_235b_to_qwen3_8b_4x8xh200_bf16 run.gpu_memory_gib=79 \\
      train.micro_batch_size=32        does not fit: refused
Models that are not on this machine are planned by recipes/shapes/. With run.gpu_memory_gib set, a
recipe that does not fit is refused, with the smallest change that would: exit code 2.
"""
PREPARE_EXAMPLES = """\
examples:
  megatron-prefix prepare quickstart run.world_size=4 train.micro_batch_size=16
The scripts in slurm/ call it, and hand the record that it names to the ranks and servers.
"""


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on where the run folder's last checkpoint is (default); "
        "--no-resume refuses a folder that holds a run",
    )


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="every number, exact")
    parser.add_argument(
        "--quick", action="store_true", help="bytes by arithmetic: build none of Megatron's modules"
    )


def run_train(arguments: argparse.Namespace) -> int:
    from megatron_prefix.plan import card_gib, refuse_what_does_not_fit
    from megatron_prefix.preflight import check_data_sets, check_machine
    from megatron_prefix.recipe import RECORD_NAME, check_run_folder
    from megatron_prefix.validate import validate

    recipe = _load(arguments)
    folder = Path(recipe.run.output_dir, recipe.run.name)
    if not arguments.resume and (folder / RECORD_NAME).exists():
        raise ValueError(f"--no-resume: {folder} holds a run; set another run.name or remove it")
    check_run_folder(folder, recipe)
    check_machine(validate(recipe))
    _warn_of_idle_settings(recipe)
    refuse_what_does_not_fit(recipe, card_gib=card_gib())
    check_data_sets(recipe)
    from megatron_prefix.launcher import launch_local

    return launch_local(recipe)


def show_plan(arguments: argparse.Namespace) -> int:
    from megatron_prefix.jobs.cluster import Cluster
    from megatron_prefix.plan import run_plan
    from megatron_prefix.recipe import factory_beside

    recipe, beside = _load(arguments), factory_beside(arguments.recipe, "cluster")
    cluster = beside() if beside else Cluster()
    run_plan(recipe, cluster, as_json=arguments.json, quick=arguments.quick)
    _warn_of_idle_settings(recipe)
    _warn_of_cards(recipe)
    return DONE


def run_launch(arguments: argparse.Namespace) -> int:
    from megatron_prefix.commands.launch_arguments import cluster_of
    from megatron_prefix.jobs.cluster import check_cluster, on_cluster
    from megatron_prefix.jobs.slurm_queue import check_can_submit
    from megatron_prefix.launch import dry_run, launch
    from megatron_prefix.plan import card_gib, refuse_what_does_not_fit
    from megatron_prefix.recipe import RECORD_NAME, save_record

    recipe, cluster = _load(arguments), cluster_of(arguments)
    check_cluster(cluster, recipe)
    recipe = on_cluster(recipe, cluster)
    folder = _checked_folder(recipe)
    here = card_gib() if cluster.executor == "local" else 0.0
    refuse_what_does_not_fit(recipe, servers_elsewhere=cluster.server_nodes > 0, card_gib=here)
    if arguments.dryrun:
        print(dry_run((folder / RECORD_NAME).absolute(), recipe, cluster), end="")
        return DONE
    if cluster.executor == "slurm":
        check_can_submit(wait=not arguments.detach)
    record = save_record(recipe, folder)
    return launch(record.absolute(), recipe, cluster, detach=arguments.detach)


def run_prepare(arguments: argparse.Namespace) -> int:
    from megatron_prefix.jobs.starts import note_own_job
    from megatron_prefix.recipe import save_record

    recipe = _load(arguments)
    record = save_record(recipe, _checked_folder(recipe))
    note_own_job(record.parent)
    print(record)
    return DONE


def _load(arguments: argparse.Namespace) -> Recipe:
    from megatron_prefix.recipe import load_recipe, write_own_data
    from megatron_prefix.secret_keys import check_secrets

    recipe = load_recipe(arguments.recipe, arguments.overlay, arguments.overrides)
    check_secrets(recipe)
    write_own_data(arguments.recipe)
    return recipe


def _checked_folder(recipe: Recipe) -> Path:
    """The run folder of a recipe that could start, but for the machines that it is to start on."""
    from megatron_prefix.preflight import check_data_sets
    from megatron_prefix.recipe import check_run_folder
    from megatron_prefix.validate import validate

    folder = Path(recipe.run.output_dir, recipe.run.name)
    check_run_folder(folder, recipe)
    validate(recipe)
    _warn_of_idle_settings(recipe)
    _warn_of_cards(recipe)
    check_data_sets(recipe)
    return folder


def _warn_of_idle_settings(recipe: Recipe) -> None:
    from megatron_prefix.validate.idle import idle_settings

    _warn(idle_settings(recipe))


def _warn_of_cards(recipe: Recipe) -> None:
    from megatron_prefix.validate.cards import asked_of_cards

    _warn(asked_of_cards(recipe))


def _warn(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        print(f"megatron-prefix: warning: {sentence}", file=sys.stderr)


TRAIN = Command(
    "run a recipe on this machine", TRAIN_EXAMPLES, add_train_arguments, run_train, ABOUT_RECIPES
)
PLAN = Command(
    "validate a recipe and lay it out, starting nothing",
    PLAN_EXAMPLES,
    add_plan_arguments,
    show_plan,
    ABOUT_RECIPES,
)
LAUNCH = Command(
    "run a recipe on a cluster, or in the background here",
    LAUNCH_EXAMPLES,
    add_launch_arguments,
    run_launch,
    ABOUT_RECIPES,
)
PREPARE = Command(
    "check a recipe, write its record, print its path",
    PREPARE_EXAMPLES,
    add_recipe_arguments,
    run_prepare,
    ABOUT_RECIPES,
)
