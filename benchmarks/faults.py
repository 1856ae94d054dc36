"""Random kills over one training run: does it go on, what was lost, how soon is it back?

SORT-CHAIN through the real path with two SGLang servers. Each fault is one of: SIGKILL of a rank at
any moment of a step, SIGKILL of a rank during a save, SIGKILL of a server, SIGSTOP of a server. The
next one comes when all is well again. Recovery is the time from the fault to the next finished
step that had not been finished before; the ranks' starts and imports are left out (the ranks log
how long those took), and servers start beside it, while the other one serves.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from megatron_prefix.exit_codes import SAVED
from megatron_prefix.jsonl import METRICS, read_records
from megatron_prefix.mcore.step_folders import saved_steps, step_of
from megatron_prefix.tasks import sort_chain

SAVE_INTERVAL = 5
STEPS = 1_000_000  # the run is ended by a signal
PATIENCE_S = 900.0
KINDS = ("rank", "rank during a save", "server", "server hangs")


@dataclass(frozen=True)
class Row:
    """One fault."""

    fault: str
    at_step: int  # finished when it came
    survived: bool
    resumed_after: int  # step; -1: the ranks stayed
    steps_redone: int  # finished once more, since the newest whole checkpoint
    steps_lost_beyond_last_save: int
    recovery_s: float  # without starts and imports of ranks
    starts_s: float  # those


class Run:
    """The training run under way."""

    def __init__(self, folder: Path, faults: int) -> None:
        self.folder, self.scratch = folder / "faults", folder / "scratch"
        self.scratch.mkdir()
        self.output = folder / "output"
        settings = [
            "run.name=faults",
            f"run.output_dir={folder}",
            f"run.max_restarts={faults}",
            f"train.steps={STEPS}",
            "eval.path=",
            f"checkpoint.save_interval={SAVE_INTERVAL}",
            "checkpoint.export_hf=false",
            "rollout.num_servers=2",
            f"rollout.server_restarts={faults}",
            "rollout.start_timeout_s=600",
            "rollout.hang_timeout_s=10",
            "log.tensorboard=false",
            "log.log_interval=1",
        ]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_prefix.cli", "train", "quickstart", *settings],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.scratch)},
            )

    def alive(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        return self.output.read_text()

    def steps(self) -> list[int]:
        return [record["step"] for record in read_records(self.folder / METRICS)]

    def finished(self) -> int:
        steps = self.steps()
        return steps[-1] if steps else 0

    def newest_save(self) -> int:
        whole = saved_steps(self.folder / "checkpoints")
        return step_of(whole[-1]) if whole else 0

    def wait(self, true: Callable[[], object]) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while not true() and self.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        return bool(true())

    def ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "megatron_prefix.worker" in child.cmdline()]

    def server(self, index: int) -> list[psutil.Process]:
        """SGLang's processes of one server, its guard left out."""
        guards = [
            child
            for child in psutil.Process(self.process.pid).children()
            if "sglang.launch_server" in child.cmdline()
        ]
        return guards[index].children(recursive=True)

    def all_well(self) -> bool:
        """Two servers that are asked, both ranks at work."""
        lost = self.said().count("lost the SGLang server")
        back = self.said().count(" is back")
        return lost == back and len(self.ranks()) == 2


def break_something(run: Run, kind: str, chance: random.Random) -> None:
    if kind == "rank during a save":
        run.wait(lambda: list((run.folder / "checkpoints").glob("*.partial")))
    else:
        time.sleep(chance.uniform(0.0, 2.0))
    if kind.startswith("rank"):
        chance.choice(run.ranks()).kill()
    elif kind == "server":
        run.server(chance.randrange(2))[0].kill()
    else:
        for process in run.server(chance.randrange(2)):
            process.send_signal(signal.SIGSTOP)


def one_fault(run: Run, kind: str, chance: random.Random) -> Row:
    said = len(run.said())
    break_something(run, kind, chance)
    start = time.monotonic()
    saved, before = run.newest_save(), run.finished()
    # A step that was under way may still end: two more are new in any case.
    survived = run.wait(lambda: run.finished() > before + 1)
    seconds, told = time.monotonic() - start, run.said()[said:]
    resumed = [int(step) for step in re.findall(r"resumed after step (\d+)", told)]
    resumed_after = resumed[-1] if resumed else -1
    starts = [float(value) for value in re.findall(r"took ([\d.]+) s to start", told)]
    well = survived and run.wait(run.all_well)
    return Row(
        fault=kind,
        at_step=before,
        survived=well,
        resumed_after=resumed_after,
        steps_redone=before - resumed_after if resumed else 0,
        steps_lost_beyond_last_save=max(0, saved - resumed_after) if resumed else 0,
        recovery_s=seconds - max(starts, default=0.0),
        starts_s=max(starts, default=0.0),
    )


@contextlib.contextmanager
def running(faults: int) -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), faults + 1)
        try:
            yield run
        finally:
            if run.alive():
                run.process.kill()
            run.process.wait()


def run_faults(faults: int, seed: int) -> list[Row]:
    chance = random.Random(seed)
    kinds = [KINDS[place % len(KINDS)] for place in range(faults)]
    chance.shuffle(kinds)
    with running(faults) as run:
        if not run.wait(lambda: run.finished() >= 2 * SAVE_INTERVAL):
            raise SystemExit(f"the run did not start:\n{run.said()}")
        rows = []
        for kind in kinds:
            rows.append(one_fault(run, kind, chance))
            print(f"{len(rows)} of {faults}: {rows[-1]}", flush=True)
            if not rows[-1].survived:
                print(run.said()[-4000:])
                return rows
        run.process.send_signal(signal.SIGTERM)
        code = run.process.wait(PATIENCE_S)
        steps = run.steps()
    if code != SAVED or steps != list(range(1, len(steps) + 1)):
        raise SystemExit(f"exit code {code}, or steps counted twice or left out: {steps}")
    return rows


def summary(faults: int, rows: list[Row]) -> dict[str, Any]:
    return {
        "faults": faults,
        "survived": sum(row.survived for row in rows),
        "steps_lost_beyond_last_save": sum(row.steps_lost_beyond_last_save for row in rows),
        "recovery_seconds": max(row.recovery_s for row in rows),
        "recovery_seconds_median": statistics.median(row.recovery_s for row in rows),
        "rows": [asdict(row) for row in rows],
    }


def show(found: dict[str, Any]) -> None:
    table = Table(title="Faults of one SORT-CHAIN run, in their order")
    for name in ("fault", "at step", "survived", "resumed after", "steps redone"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for name in ("lost beyond save", "recovery s", "rank start s"):
        table.add_column(name, justify="right")
    for row in found["rows"]:
        resumed = str(row["resumed_after"]) if row["resumed_after"] >= 0 else "-"
        words = [row["fault"], str(row["at_step"]), "yes" if row["survived"] else "no", resumed]
        words += [str(row["steps_redone"]), str(row["steps_lost_beyond_last_save"])]
        table.add_row(*words, f"{row['recovery_s']:.1f}", f"{row['starts_s']:.1f}")
    Console(width=120).print(table)
    print(
        f"{found['survived']} of {found['faults']} survived; "
        f"{found['steps_lost_beyond_last_save']} steps lost beyond the last save; recovery "
        f"{found['recovery_seconds_median']:.1f} s (median), {found['recovery_seconds']:.1f} s "
        "(longest)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 faults, one of each kind")
    parser.add_argument("--faults", type=int, default=0, help="(20; --quick 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    arguments = parser.parse_args()
    faults = arguments.faults or (4 if arguments.quick else 20)
    sort_chain.prepare_data(".cache/sort_chain")
    found = summary(faults, run_faults(faults, arguments.seed))
    show(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
