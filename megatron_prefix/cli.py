"""The command ``megatron-prefix``: reads arguments, reports users' errors in one line."""

import argparse
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_prefix.advise_arguments import EXAMPLES as _ADVISE_EXAMPLES
from megatron_prefix.advise_arguments import add_advise_arguments
from megatron_prefix.config import Recipe
from megatron_prefix.eval_arguments import EXAMPLES as _EVAL_EXAMPLES
from megatron_prefix.eval_arguments import add_eval_arguments
from megatron_prefix.exit_codes import BAD_INPUT, DONE, FAILED
from megatron_prefix.launch_arguments import EXAMPLES as _LAUNCH_EXAMPLES
from megatron_prefix.launch_arguments import add_launch_arguments
from megatron_prefix.report_arguments import EXAMPLES as _REPORT_EXAMPLES
from megatron_prefix.report_arguments import add_report_arguments
from megatron_prefix.run_commands import RUN_COMMANDS

_WITHOUT_RECIPE = ("eval", "report", "doctor", *RUN_COMMANDS)

_RECIPES = """\
RECIPE is a Python file with `def recipe() -> Recipe`, the name of one in recipes/, an importable
package.module, or the recipe.yaml of a run's folder, which repeats that run's settings.
Settings are laid over it in this order: recipe < --overlay FILE < section.key=value ...
"""
_EXIT_CODES = """\
exit codes:
  0   done
  1   failure while running; the run folder's logs say more
  2   bad input, told in one line on stderr; nothing was started
  75  stopped by a signal with everything saved; the same command goes on
"""
_EXAMPLES = {
    "main": """\
examples:
  megatron-prefix doctor                             what can this machine run?
  megatron-prefix plan recipes/quickstart.py         what would it cost? starts nothing
  megatron-prefix train recipes/quickstart.py        run it
  megatron-prefix train recipes/quickstart.py train.steps=50 prefix.policy=anchored
  megatron-prefix status runs/quickstart             where does it stand? also: logs, cancel
  megatron-prefix eval runs/quickstart               how good is what it trained?
  megatron-prefix report runs/quickstart             one page with pictures of all of it
""",
    "train": """\
examples:
  megatron-prefix train recipes/quickstart.py
  megatron-prefix train quickstart run.name=short prefix.policy=fixed prefix.min_length=9
  megatron-prefix train quickstart --overlay cluster.yaml optimizer.lr=1e-4
  megatron-prefix train runs/short/recipe.yaml run.name=again      the same settings once more
Ctrl-C or SIGTERM saves and ends with exit code 75; the same command resumes. A second one kills.
""",
    "plan": """\
examples:
  megatron-prefix plan recipes/quickstart.py
  megatron-prefix plan quickstart student.tensor_model_parallel_size=4 run.world_size=8
  megatron-prefix plan quickstart --json | jq .cost.run.ratio
  megatron-prefix plan qwen3_235b_to_qwen3_8b_4x8xh200_bf16 run.gpu_memory_gib=80
Models that are not on this machine are planned by recipes/shapes/. With run.gpu_memory_gib set, a
recipe that does not fit is refused, with the smallest change that would: exit code 2.
""",
    "eval": _EVAL_EXAMPLES,
    "report": _REPORT_EXAMPLES,
    "advise": _ADVISE_EXAMPLES,
    "launch": _LAUNCH_EXAMPLES,
    **{name: verb.examples for name, verb in RUN_COMMANDS.items()},
    "prepare": """\
examples:
  megatron-prefix prepare quickstart run.world_size=16
The scripts in slurm/ call it, and hand the record that it names to the ranks and servers.
""",
    "doctor": """\
examples:
  megatron-prefix doctor
  megatron-prefix doctor --json
  megatron-prefix doctor --node runs/NAME --gpus 8      what a job's scripts ask each node first
Exit code 0 where this machine can run the CPU path at least, 1 where it cannot; with --node 2.
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. A user's error is one line on stderr."""
    arguments = _parse(argv)
    try:
        return arguments.command(arguments)
    except ValueError as error:
        print(f"megatron-prefix: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # `| head` has seen enough; Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes positional arguments from one place alone: settings after an option come
    back as unknown."""
    parser = build_parser()
    arguments, others = parser.parse_known_args(argv)
    strange = [text for text in others if text.startswith("-") or "overrides" not in arguments]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if others:
        arguments.overrides = [*arguments.overrides, *others]
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-prefix",
        description="On-policy prefix distillation in Megatron-Core, with rollouts from SGLang.",
        epilog=_EXAMPLES["main"] + "\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    train = _command(commands, "train", "run a recipe on this machine", _train)
    _recipe_arguments(train)
    train.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on where the run folder's last checkpoint is (default); "
        "--no-resume refuses a folder that holds a run",
    )
    plan = _command(commands, "plan", "validate a recipe and lay it out, starting nothing", _plan)
    _recipe_arguments(plan)
    plan.add_argument("--json", action="store_true", help="every number, exact")
    plan.add_argument(
        "--quick", action="store_true", help="bytes by arithmetic: build none of Megatron's modules"
    )
    start = _command(commands, "launch", "run a recipe on a cluster, through nemo-run", _launch)
    _recipe_arguments(start)
    add_launch_arguments(start)
    for name, verb in RUN_COMMANDS.items():
        verb.add_arguments(_command(commands, name, verb.summary, verb.run))
    _recipe_arguments(
        _command(commands, "prepare", "check a recipe, write its record, print its path", _prepare)
    )
    judge = _command(commands, "eval", "ask a model a data set's problems and score it", _eval)
    add_eval_arguments(judge)
    report = _command(commands, "report", "one page out of one run or several", _report)
    add_report_arguments(report)
    add_advise_arguments(
        _command(commands, "advise", "the prefix that a pilot of full rollouts asks for", _advise)
    )
    doctor = _command(commands, "doctor", "what this machine has, can run, and lacks", _doctor)
    doctor.add_argument("--json", action="store_true", help="the findings as JSON")
    doctor.add_argument(
        "--node", type=Path, metavar="FOLDER", help="can this node of a job run the one in FOLDER?"
    )
    doctor.add_argument(
        "--gpus",
        type=int,
        default=int(os.environ.get("SLURM_GPUS_ON_NODE") or 0),
        metavar="N",
        help="that --node has to have (default: as many as Slurm gave this step)",
    )
    return parser


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    summary: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    about = summary[0].upper() + summary[1:] + "."
    parser = commands.add_parser(
        name,
        help=summary,
        description=about if name in _WITHOUT_RECIPE else f"{about}\n\n{_RECIPES}",
        epilog=_EXAMPLES[name] + "\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a file, a name, a module or a record")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings, typed; the last wins"
    )
    parser.add_argument("--overlay", default="", metavar="FILE", help="a YAML file of settings")


def _load(arguments: argparse.Namespace) -> Recipe:
    from megatron_prefix.recipe import load_recipe
    from megatron_prefix.secret_keys import check_secrets

    recipe = load_recipe(arguments.recipe, arguments.overlay, arguments.overrides)
    check_secrets(recipe)
    return recipe


def _train(arguments: argparse.Namespace) -> int:
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
    refuse_what_does_not_fit(recipe, card_gib=card_gib())
    check_data_sets(recipe)
    from megatron_prefix.launcher import launch_local

    return launch_local(recipe)


def _launch(arguments: argparse.Namespace) -> int:
    from megatron_prefix.cluster import check_cluster, on_cluster
    from megatron_prefix.launch import dry_run, launch
    from megatron_prefix.launch_arguments import cluster_of
    from megatron_prefix.plan import card_gib, refuse_what_does_not_fit
    from megatron_prefix.recipe import RECORD_NAME, save_record
    from megatron_prefix.slurm_queue import check_can_submit

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


def _prepare(arguments: argparse.Namespace) -> int:
    from megatron_prefix.jobs import note_own_job
    from megatron_prefix.recipe import save_record

    recipe = _load(arguments)
    record = save_record(recipe, _checked_folder(recipe))
    note_own_job(record.parent)
    print(record)
    return DONE


def _checked_folder(recipe: Recipe) -> Path:
    """The run folder of a recipe that could start, but for the machines that it is to start on."""
    from megatron_prefix.preflight import check_data_sets
    from megatron_prefix.recipe import check_run_folder
    from megatron_prefix.validate import validate

    folder = Path(recipe.run.output_dir, recipe.run.name)
    check_run_folder(folder, recipe)
    validate(recipe)
    check_data_sets(recipe)
    return folder


def _plan(arguments: argparse.Namespace) -> int:
    from megatron_prefix.cluster import Cluster
    from megatron_prefix.plan import run_plan
    from megatron_prefix.recipe import factory_beside

    recipe, beside = _load(arguments), factory_beside(arguments.recipe, "cluster")
    cluster = beside() if beside else Cluster()
    run_plan(recipe, cluster, as_json=arguments.json, quick=arguments.quick)
    return DONE


def _eval(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_prefix.eval_job import make_job, run_eval

    return run_eval(make_job(arguments), Console(stderr=True), arguments.json)


def _report(arguments: argparse.Namespace) -> int:
    from megatron_prefix.report.page import write_report
    from megatron_prefix.report_arguments import output_of

    runs = [Path(run) for run in arguments.runs]
    print(write_report(runs, output_of(runs, arguments.output)))
    return DONE


def _advise(arguments: argparse.Namespace) -> int:
    from megatron_prefix.advise_job import run_advise

    return run_advise(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from megatron_prefix.doctor import examine, findings_json, node_problems, print_findings

    findings = examine()
    if arguments.node:
        problems = node_problems(findings, arguments.node, arguments.gpus)
        if problems:
            raise ValueError(f"node {socket.gethostname()}: {'; '.join(problems)}")
        print(f"node {socket.gethostname()}: {findings.engine}", flush=True)
        return DONE
    if arguments.json:
        print(findings_json(findings))
    else:
        from rich.console import Console

        print_findings(findings, Console())
    return DONE if findings.cpu_path else FAILED


if __name__ == "__main__":
    sys.exit(main())
