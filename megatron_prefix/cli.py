"""The command ``megatron-prefix``: reads arguments, reports users' errors in one line."""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prefix.commands.advise_arguments import EXAMPLES as _ADVISE_EXAMPLES
from megatron_prefix.commands.advise_arguments import add_advise_arguments
from megatron_prefix.commands.command import ABOUT_RECIPES, Command
from megatron_prefix.commands.eval_arguments import EXAMPLES as _EVAL_EXAMPLES
from megatron_prefix.commands.eval_arguments import add_eval_arguments, in_options
from megatron_prefix.commands.of_recipes import LAUNCH, PLAN, PREPARE, TRAIN
from megatron_prefix.commands.of_runs import RUN_COMMANDS
from megatron_prefix.commands.report_arguments import EXAMPLES as _REPORT_EXAMPLES
from megatron_prefix.commands.report_arguments import add_report_arguments
from megatron_prefix.exit_codes import BAD_INPUT, DONE, FAILED
from megatron_prefix.recipe.settings import did_you_mean

_EXIT_CODES = """\
exit codes:
  0   done
  1   failure while running; the run folder's logs say more
  2   bad input, told in one line on stderr; nothing was started
  75  stopped by a signal with everything saved; run the same command again to resume
"""
_EXAMPLES = """\
examples:
  megatron-prefix doctor                             what can this machine run?
  megatron-prefix plan recipes/quickstart.py         what would it cost? starts nothing
  megatron-prefix train recipes/quickstart.py        run it
  megatron-prefix train recipes/quickstart.py train.steps=50 prefix.policy=anchored
  megatron-prefix status runs/quickstart             where does it stand? also: logs, cancel
  megatron-prefix eval runs/quickstart               how good is what it trained?
  megatron-prefix report runs/quickstart             one page with pictures of all of it
"""
_DOCTOR_EXAMPLES = """\
examples:
  megatron-prefix doctor
  megatron-prefix doctor --json
  megatron-prefix doctor --node runs/NAME --gpus 8      what a job's scripts ask each node first
Exit code 0 where this machine can run the CPU path at least, 1 where it cannot; with --node 2.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. A user's error is one line on stderr."""
    arguments = parse(argv)
    try:
        return arguments.command(arguments)
    except ValueError as error:
        print(f"megatron-prefix: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except BrokenPipeError:  # `| head` has seen enough; Python would complain again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """argparse takes positional arguments from one place alone: settings after an option come
    back as unknown."""
    parser, words = build_parser(), sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-") and words[0] not in _COMMANDS:
        parser.error(f"no command {words[0]!r}.{did_you_mean(words[0], tuple(_COMMANDS))}")
    arguments, others = parser.parse_known_args(words)
    strange = [text for text in others if text.startswith("-") or "overrides" not in arguments]
    if strange:
        arguments.parser.error(f"unrecognized arguments: {' '.join(strange)}")
    if others:
        arguments.overrides = [*arguments.overrides, *others]
    return arguments


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-prefix",
        description="On-policy prefix distillation in Megatron-Core, with rollouts from SGLang.",
        epilog=_EXAMPLES + "\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        about = command.summary[0].upper() + command.summary[1:] + "."
        one = commands.add_parser(
            name,
            help=command.summary,
            description=f"{about}\n\n{command.about}" if command.about else about,
            epilog=command.examples + "\n" + _EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(one)
        one.set_defaults(command=command.run, parser=one)
    return parser


def _add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    parser.add_argument(
        "--node", type=Path, metavar="FOLDER", help="can this node of a job run the one in FOLDER?"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="that --node has to have (default: as many as Slurm gave this step)",
    )


def _gpus(asked: int | None) -> int:
    return int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) if asked is None else asked


def _eval(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from megatron_prefix.evaluation.job import make_job, run_eval

    try:
        return run_eval(make_job(arguments), Console(stderr=True), arguments.json)
    except ValueError as error:
        raise ValueError(in_options(str(error))) from error


def _report(arguments: argparse.Namespace) -> int:
    from megatron_prefix.commands.of_runs import folders_of_runs
    from megatron_prefix.commands.report_arguments import output_of
    from megatron_prefix.report.page import write_report
    from megatron_prefix.report.story import refuse_no_run

    runs = folders_of_runs(arguments.runs, refuse_no_run)
    print(write_report(runs, output_of(runs, arguments.output)))
    return DONE


def _advise(arguments: argparse.Namespace) -> int:
    from megatron_prefix.commands.advise_job import run_advise

    return run_advise(arguments)


def _doctor(arguments: argparse.Namespace) -> int:
    from megatron_prefix.doctor import examine, findings_json, node_problems, print_findings

    findings = examine()
    if arguments.gpus is not None and not arguments.node:
        raise ValueError(f"--gpus {arguments.gpus} is asked of --node FOLDER alone; give both")
    if arguments.node:
        problems = node_problems(findings, arguments.node, _gpus(arguments.gpus))
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


_COMMANDS = {
    "doctor": Command(
        "what this machine has, can run, and lacks", _DOCTOR_EXAMPLES, _add_doctor_arguments,
        _doctor,
    ),
    "plan": PLAN,
    "advise": Command(
        "the prefix that a pilot of full rollouts asks for", _ADVISE_EXAMPLES,
        add_advise_arguments, _advise, ABOUT_RECIPES,
    ),
    "train": TRAIN,
    "launch": LAUNCH,
    **RUN_COMMANDS,
    "eval": Command(
        "ask a model a data set's problems and score it", _EVAL_EXAMPLES, add_eval_arguments, _eval
    ),
    "report": Command(
        "one page out of one run or several", _REPORT_EXAMPLES, add_report_arguments, _report
    ),
    "prepare": PREPARE,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
