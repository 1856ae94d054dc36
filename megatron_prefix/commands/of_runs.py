"""``megatron-prefix status``, ``logs`` and ``cancel``: what is asked of a run that was started."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_prefix.commands.command import Command
from megatron_prefix.exit_codes import DONE, FAILED

STATUS_EXAMPLES = """\
examples:
  megatron-prefix status runs/quickstart
  megatron-prefix status runs/* --json | jq '.[] | [.folder, .step, .active]'
A job's state is asked of squeue, and once it forgot the job, of sacct; that of `megatron-prefix
train` on its own machine, of the process. The rest is read from the run's folder.
"""
LOGS_EXAMPLES = """\
examples:
  megatron-prefix logs runs/NAME                     the end of the newest attempt's log
  megatron-prefix logs runs/NAME -f                  and what comes, over requeues, until it ends
  megatron-prefix logs runs/NAME --list              all attempts and their files
  megatron-prefix logs runs/NAME --attempt 12.0 -n 0 all that job 12 said before its first requeue
  megatron-prefix logs runs/NAME --servers           the SGLang servers' side
"""
CANCEL_EXAMPLES = """\
examples:
  megatron-prefix cancel runs/NAME                   save, then end; the same command resumes it
  megatron-prefix cancel runs/NAME --save-within 60  a minute for the save, then cut it off
  megatron-prefix cancel runs/NAME --now             at once: steps since the last save are lost
Jobs that wait leave the queue; one that runs is told to save (USR1; SIGTERM of a process), is not
requeued, and is cut off where it takes too long. Exit code 1 where it had to be.
"""


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--json", action="store_true", help="a list, an object a run")


def add_logs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("-f", "--follow", action="store_true", help="until the run has ended")
    parser.add_argument(
        "-n", "--lines", type=int, default=40, metavar="N", help="of its end; 0: all (default: 40)"
    )
    parser.add_argument("--attempt", default="", metavar="NAME", help="default: the newest")
    parser.add_argument("--servers", action="store_true", help="the servers' logs")
    parser.add_argument("--list", action="store_true", help="attempts and files; shows no log")


def add_cancel_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--save-within", type=float, default=600.0, metavar="S", help="seconds (default: 600)"
    )
    parser.add_argument("--now", action="store_true", help="do not save")


def run_status(arguments: argparse.Namespace) -> int:
    from megatron_prefix.jobs.run_state import read_state, run_folder, state_json, state_lines

    states = [read_state(folder) for folder in folders_of_runs(arguments.runs, run_folder)]
    if arguments.json:
        print(state_json(states))
    else:
        print("\n\n".join("\n".join(state_lines(state)) for state in states))
    return DONE


def folders_of_runs(runs: Sequence[str], find: Callable[[str], Path]) -> list[Path]:
    """``find`` of each run. Of several those that ``find`` refuses with a ValueError are told and
    left out, for ``runs/*`` names files and empty folders too; ValueError where none is left."""
    if len(runs) == 1:
        return [find(runs[0])]
    found = []
    for run in runs:
        try:
            found.append(find(run))
        except ValueError as error:
            words = " ".join(str(error).split())
            print(f"megatron-prefix: warning: left out: {words}", file=sys.stderr)
    if not found:
        raise ValueError(f"none of the {len(runs)} named is a run's folder; give one that is")
    return found


def run_logs(arguments: argparse.Namespace) -> int:
    from megatron_prefix.jobs.attempts import Follower, choose, last_lines, run_attempts
    from megatron_prefix.jobs.run_state import is_active, run_folder

    if arguments.lines < 0:
        raise ValueError(f"--lines {arguments.lines} must be at least 0, which shows all")
    folder = run_folder(arguments.run)
    if arguments.follow:
        if arguments.attempt:
            raise ValueError("--follow shows the newest attempt; leave --attempt out")
        follower = Follower(folder, arguments.servers, lambda: is_active(folder))
        with contextlib.suppress(KeyboardInterrupt):  # the reader has seen enough
            follower.follow(arguments.lines)
        return DONE
    attempts = run_attempts(folder)
    if arguments.list:
        for attempt in attempts:
            for path in (*attempt.trainer, *attempt.servers):
                print(f"{attempt.name}  {path.stat().st_size:>9} bytes  {path}")
        return DONE
    attempt = choose(attempts, arguments.attempt)
    for path in attempt.files(arguments.servers):
        print(f"==> {attempt.name}: {path} <==")
        sys.stdout.writelines(last_lines(path, arguments.lines))
    return DONE


def run_cancel(arguments: argparse.Namespace) -> int:
    from megatron_prefix.jobs.cancel import Patience, cancel_run
    from megatron_prefix.jobs.run_state import newest_checkpoint, nothing_to_cancel, run_folder

    if arguments.save_within <= 0:
        raise ValueError(f"--save-within {arguments.save_within:g} must be above 0; or give --now")
    folder = run_folder(arguments.run)
    if words := nothing_to_cancel(folder):
        print(f"{folder}: {words}")
        return DONE
    patience = Patience(0.0 if arguments.now else arguments.save_within)
    whole = cancel_run(folder, patience, lambda words: print(words, flush=True))
    saved = newest_checkpoint(folder)
    words = f"step {saved} is saved: run the same command again to resume"
    print(f"{folder}: {words if saved else 'nothing is saved; the same command starts anew'}")
    return DONE if whole else FAILED


RUN_COMMANDS = {
    "status": Command(
        "where a run stands: queue, step, checkpoint", STATUS_EXAMPLES,
        add_status_arguments, run_status,
    ),
    "logs": Command(
        "the logs of a run's attempts", LOGS_EXAMPLES, add_logs_arguments, run_logs
    ),
    "cancel": Command(
        "save and end a run", CANCEL_EXAMPLES, add_cancel_arguments, run_cancel
    ),
}  # fmt: skip
