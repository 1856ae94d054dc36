"""Random kills over one training run: does it go on, what was lost, how soon is it back?

SORT-CHAIN through the real path with two SGLang servers. Each fault is one of: SIGKILL of a rank at
any moment of a step, SIGKILL of a rank during a save, SIGKILL of a server, SIGSTOP of a server. The
next one comes when all is well again. Recovery is the time from the fault to the next finished
step that had not been finished before; the ranks' starts and imports are left out (the ranks log
how long those took), and servers start beside it, while the other one serves.

At the end the recorded rollouts are replayed by a run that nobody disturbs: every loss and gradient
norm has to be the same to the last bit, and every prompt is there once, in its order. What was
found so far is written to --json after each fault; --minutes ends the faults early.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from megatron_prefix.exit_codes import SAVED
from megatron_prefix.mcore.step_folders import saved_steps, step_of
from megatron_prefix.rollout.records import load_rollouts
from megatron_prefix.run_files.jsonl import METRICS, read_records
from megatron_prefix.tasks import sort_chain

SAVE_INTERVAL = 5
STEPS = 1_000_000  # the run is ended by a signal
PATIENCE_S = 900.0
HANG_TIMEOUT_S, SYNC_TIMEOUT_S = 5, 6  # no server has more than a second's work here
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
    noticed_s: float  # of it: until the ranks are told to start again; 0 where they stayed
    restored_s: float  # of it: from then until the checkpoint is loaded
    starts_s: float  # starts and imports of ranks


def start(
    folder: Path, settings: Sequence[str], output: Path, scratch: Path
) -> subprocess.Popen[bytes]:
    common = [f"run.output_dir={folder}", f"train.steps={STEPS}", "eval.path="]
    common += ["checkpoint.export_hf=false", "log.tensorboard=false", "log.log_interval=1"]
    command = [sys.executable, "-m", "megatron_prefix.cli", "train", "quickstart"]
    with output.open("w") as file:
        return subprocess.Popen(
            [*command, *common, *settings],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )


@dataclass(frozen=True)
class Found:
    """All faults of a run."""

    rows: list[Row]
    steps: int
    differing_steps: int  # whose loss or gradient a replay without faults does not have


class Run:
    """The training run under way."""

    def __init__(self, folder: Path, faults: int) -> None:
        self.folder, self.scratch = folder / "faults", folder / "scratch"
        self.scratch.mkdir()
        self.output = folder / "output"
        settings = [
            "run.name=faults",
            f"run.max_restarts={faults}",
            f"checkpoint.save_interval={SAVE_INTERVAL}",
            "rollout.num_servers=2",
            f"rollout.server_restarts={faults}",
            "rollout.start_timeout_s=600",
            f"rollout.hang_timeout_s={HANG_TIMEOUT_S}",
            f"rollout.sync_timeout_s={SYNC_TIMEOUT_S}",
            "rollout.record=true",
        ]
        self.process = start(folder, settings, self.output, self.scratch)

    def alive(self) -> bool:
        return self.process.poll() is None

    def said(self) -> str:
        return self.output.read_text()

    def steps(self) -> list[int]:
        return [record["step"] for record in read_records(self.folder / METRICS)]

    def finished(self) -> int:
        steps = self.steps()
        return steps[-1] if steps else 0

    def start_seconds(self) -> float:
        """Of the rank that took longest, at its last start: the others wait for it."""
        logs = [log.read_text() for log in (self.folder / "logs").glob("rank_?.log")]
        starts = [re.findall(r"took ([\d.]+) s to start", log) for log in logs]
        return max(float(values[-1]) for values in starts)

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


class Moments:
    """When a run that was broken said what, seconds from the fault."""

    def __init__(self, run: Run, said: int) -> None:
        self._run, self._said, self._start = run, said, time.monotonic()
        self._before = run.finished()
        self.again = self.resumed = self.well = 0.0  # 0: not yet

    def told(self) -> str:
        return self._run.said()[self._said :]

    def recovered(self) -> bool:
        """Whether a step was finished that had not been before."""
        now, told = time.monotonic() - self._start, self.told()
        if not self.again and "the ranks start again" in told:
            self.again = now
        if not self.resumed and "resumed after step" in told:
            self.resumed = now
        # A step that was under way in ranks that stay may still end: two more are new in any case.
        if self._run.finished() > self._before + (not self.resumed):
            self.well = now
        return bool(self.well)


def one_fault(run: Run, kind: str, chance: random.Random) -> Row:
    said = len(run.said())
    break_something(run, kind, chance)
    moments = Moments(run, said)
    saved, before = run.newest_save(), run.finished()
    survived = run.wait(moments.recovered)
    told = moments.told()
    resumed = [int(step) for step in re.findall(r"resumed after step (\d+)", told)]
    starts_s = run.start_seconds() if resumed else 0.0
    well = survived and run.wait(run.all_well)
    return Row(
        fault=kind,
        at_step=before,
        survived=well,
        resumed_after=resumed[-1] if resumed else -1,
        steps_redone=before - resumed[-1] if resumed else 0,
        steps_lost_beyond_last_save=max(0, saved - resumed[-1]) if resumed else 0,
        recovery_s=moments.well - starts_s,
        noticed_s=moments.again,
        restored_s=moments.resumed - moments.again - starts_s if resumed else 0.0,
        starts_s=starts_s,
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


def run_faults(
    faults: int, seed: int, minutes: float, keep: Callable[[list[Row]], object]
) -> Found:
    chance, deadline = random.Random(seed), time.monotonic() + 60 * minutes
    kinds = [KINDS[place % len(KINDS)] for place in range(faults)]
    chance.shuffle(kinds)
    rows: list[Row] = []
    with running(faults) as run:
        if not run.wait(lambda: run.finished() >= 2 * SAVE_INTERVAL):
            raise SystemExit(f"the run did not start:\n{run.said()}")
        for kind in kinds:
            if time.monotonic() > deadline:
                break
            rows.append(one_fault(run, kind, chance))
            keep(rows)
            print(f"{len(rows)} of {faults}: {rows[-1]}", flush=True)
            if not rows[-1].survived:
                raise SystemExit(run.said()[-4000:])
        run.process.send_signal(signal.SIGTERM)
        code = run.process.wait(PATIENCE_S)
        if code != SAVED:
            raise SystemExit(f"exit code {code}:\n{run.said()[-4000:]}")
        steps = counted_once(run)
        return Found(rows, steps, differing_steps(run, steps))


def counted_once(run: Run) -> int:
    """Steps of the run, each once and each prompt once; ends the benchmark where that is not so."""
    steps = run.steps()
    prompts = [
        rollout.prompt_index
        for step in range(len(steps))
        for rollout in load_rollouts(run.folder / "rollouts", step)
    ]
    if steps != list(range(1, len(steps) + 1)) or prompts != list(range(len(prompts))):
        raise SystemExit(f"steps or prompts counted twice or left out: {steps}")
    return len(steps)


def differing_steps(run: Run, steps: int) -> int:
    """Steps in which an undisturbed run on the same rollouts has another loss or gradient."""
    parent, replayed = run.folder.parent, run.folder.parent / "replayed"
    settings = ["run.name=replayed", "checkpoint.save_interval=0", "rollout.record=false"]
    settings.append(f"rollout.replay={run.folder / 'rollouts'}")
    process = start(parent, settings, parent / "replayed.output", run.scratch)
    process.wait(PATIENCE_S)  # it ends where the recording does
    # It may hold the rollouts of a step that was not taken any more.
    again = list(itertools.islice(read_records(replayed / METRICS), steps))
    names = ("step", "loss", "grad_norm", "prefix_tokens")
    pairs = zip(read_records(run.folder / METRICS), again, strict=True)
    return sum(any(live[name] != other[name] for name in names) for live, other in pairs)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "faults": len(rows),
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
    for name in ("lost beyond save", "recovery s", "noticed", "restored", "rank start s"):
        table.add_column(name, justify="right")
    for row in found["rows"]:
        resumed = str(row["resumed_after"]) if row["resumed_after"] >= 0 else "-"
        words = [row["fault"], str(row["at_step"]), "yes" if row["survived"] else "no", resumed]
        words += [str(row["steps_redone"]), str(row["steps_lost_beyond_last_save"])]
        seconds = (row[f"{name}_s"] for name in ("recovery", "noticed", "restored", "starts"))
        table.add_row(*words, *(f"{value:.1f}" for value in seconds))
    Console(width=132).print(table)
    print(
        f"{found['survived']} of {found['faults']} survived; "
        f"{found['steps_lost_beyond_last_save']} steps lost beyond the last save; recovery "
        f"{found['recovery_seconds_median']:.1f} s (median), {found['recovery_seconds']:.1f} s "
        "(longest)"
    )
    print(
        f"{found['steps']} steps; a run on the same rollouts without faults differs in "
        f"{found['differing_steps']} of them"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 faults, one of each kind")
    parser.add_argument("--faults", type=int, default=0, help="(20; --quick 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no fault after so many")
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    arguments = parser.parse_args()

    def keep(rows: list[Row], **more: int) -> dict[str, Any]:
        found = summary(rows) | more
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1))
        return found

    sort_chain.prepare_data(".cache/sort_chain")
    count = arguments.faults or (4 if arguments.quick else 20)
    found = run_faults(count, arguments.seed, arguments.minutes, keep)
    show(keep(found.rows, steps=found.steps, differing_steps=found.differing_steps))


if __name__ == "__main__":
    main()
