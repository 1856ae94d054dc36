"""Where a run stands, read from its folder and asked of who runs it: what ``status`` prints."""

import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prefix.config import Recipe
from megatron_prefix.exit_codes import DONE, HUNG, SAVED
from megatron_prefix.jobs.attempts import attempts_of
from megatron_prefix.jobs.slurm_queue import JobState, job_state
from megatron_prefix.jobs.starts import LocalStart, SlurmJob, Start, read_starts
from megatron_prefix.recipe import RECORD_NAME, load_record
from megatron_prefix.run_files.jsonl import EVALUATIONS, EVENTS, METRICS, number, read_records
from megatron_prefix.run_files.progress import duration

# Events that are a verdict on the run's health; resumes, stops and saves are its ordinary life.
VERDICTS = ("slow", "alarm", "servers", "skipped", "empty", "save")
_BLOCK = 2**16


@dataclass(frozen=True)
class StartState:
    """One job, or one launcher on a machine."""

    name: str  # job 12 | process 4711 on login1
    state: str  # Slurm's word; RUNNING, COMPLETED, SAVED, FAILED, KILLED or ELSEWHERE of a process
    runs: bool
    waits: bool = False
    detail: str = ""  # why it waits, where it runs, what it ended with


@dataclass(frozen=True)
class LastEvaluation:
    step: int  # 0: before training
    accuracy: float  # 0 to 1; NaN where it was not finite
    n: int  # answers


@dataclass(frozen=True)
class RunState:
    """Where a run stands, by its folder and its job queue."""

    folder: str
    starts: tuple[StartState, ...]  # oldest first
    attempts: int  # of the newest job; 1 where it was never requeued
    step: int  # finished; 0: none yet
    steps: int  # train.steps
    step_age_s: float  # since the last step; 0 where there is none
    figures: dict[str, float]  # of the last step; NaN where a value was not finite
    evaluation: LastEvaluation | None
    checkpoint: int  # the newest whole one's step; 0: none
    verdicts: dict[str, int]  # events by kind
    last_verdict: str

    @property
    def active(self) -> bool:
        """Whether anything of the run runs or waits in a queue."""
        return any(start.runs or start.waits for start in self.starts)


def run_folder(text: str) -> Path:
    """The folder of a run; ValueError where it is none."""
    folder = Path(text)
    if folder.name == RECORD_NAME:
        folder = folder.parent
    if not (folder / RECORD_NAME).is_file():
        raise ValueError(
            f"{text} is no run's folder: it has no {RECORD_NAME}; give run.output_dir/run.name, "
            "like runs/quickstart"
        )
    return folder


def read_state(folder: Path, ask: Callable[[int], JobState] = job_state) -> RunState:
    """``ask``: Slurm, for the state of a job. ValueError where it does not answer."""
    recipe: Recipe = load_record(folder / RECORD_NAME)
    starts = read_starts(folder)
    last = last_record(folder / METRICS)
    events = read_records(folder / EVENTS)
    verdicts = [event for event in events if event.get("kind") in VERDICTS]
    return RunState(
        folder=str(folder),
        starts=tuple(state_of(start, ask) for start in starts),
        attempts=_attempts(folder, starts),
        step=int(last.get("step", 0)),
        steps=recipe.train.steps,
        step_age_s=time.time() - (folder / METRICS).stat().st_mtime if last else 0.0,
        figures=_figures(last),
        evaluation=_evaluation(last_record(folder / EVALUATIONS)),
        checkpoint=newest_checkpoint(folder),
        verdicts=dict(Counter(str(event["kind"]) for event in verdicts)),
        last_verdict=_words(verdicts[-1]) if verdicts else "",
    )


def state_of(start: Start, ask: Callable[[int], JobState]) -> StartState:
    if isinstance(start, SlurmJob):
        job = ask(start.number)
        code = f"exit code {job.exit_code.partition(':')[0]}" if job.exit_code else ""
        detail = job.reason or (f"on {job.nodes}" if job.runs and job.nodes else code)
        return StartState(f"job {start.number}", job.state, job.runs, job.waits, detail)
    name = f"process {start.pid} on {start.host}"
    if start.ended is not None:
        state = {DONE: "COMPLETED", SAVED: "SAVED"}.get(start.ended, "FAILED")
        why = " (hung)" if start.ended == HUNG else ""
        return StartState(name, state, False, detail=f"exit code {start.ended}{why}")
    if not start.is_here:
        return StartState(name, "ELSEWHERE", False, detail="its own machine can say more")
    running = start.runs()
    return StartState(name, "RUNNING" if running else "KILLED", running)


def newest_checkpoint(folder: Path) -> int:
    """The step of the newest whole checkpoint; 0 where there is none."""
    names = (path.name for path in (folder / "checkpoints").glob("step_*"))
    found = [re.fullmatch(r"step_(\d+)", name) for name in names]
    return max((int(match[1]) for match in found if match), default=0)


def last_record(path: Path) -> dict[str, Any]:
    """The last whole line of JSON lines, without reading those before it; empty where none is."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        end = tail_start = file.seek(0, os.SEEK_END)
        tail = b""
        while tail_start and tail.count(b"\n") < 2:
            tail_start = max(0, tail_start - _BLOCK)
            file.seek(tail_start)
            tail = file.read(end - tail_start)
    whole = tail[: tail.rfind(b"\n") + 1].splitlines()
    try:
        record = json.loads(whole[-1]) if whole else {}
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _figures(record: dict[str, Any]) -> dict[str, float]:
    names = ("loss", "grad_norm", "prefix_length")
    named: dict[str, Any] = {key: record[key] for key in names if key in record}
    if record:
        named["seconds"] = sum(value or 0.0 for value in record.get("seconds", {}).values())
    return {key: math.nan if value is None else float(value) for key, value in named.items()}


def _evaluation(record: dict[str, Any]) -> LastEvaluation | None:
    if not record:
        return None
    accuracy = math.nan if record["accuracy"] is None else record["accuracy"]
    return LastEvaluation(record["step"], accuracy, record["n"])


def _words(event: dict[str, Any]) -> str:
    return f"step {event.get('step')}: {event['kind']}: {event.get('message', '')}"


def _attempts(folder: Path, starts: list[Start]) -> int:
    newest = starts[-1] if starts else None
    if isinstance(newest, LocalStart):
        return sum(isinstance(start, LocalStart) for start in starts)
    return max(1, len(attempts_of(folder, newest))) if newest else 0


def is_active(folder: Path) -> bool:
    """Whether anything of the run runs or waits in a queue."""
    states = (state_of(start, job_state) for start in read_starts(folder))
    return any(state.runs or state.waits for state in states)


def nothing_to_cancel(folder: Path) -> str:
    """Why a cancellation has nothing to do, in words; empty where something runs or waits, or may
    do so on another machine."""
    state = read_state(folder)
    if state.active or any(start.state == "ELSEWHERE" for start in state.starts):
        return ""
    if state.step >= state.steps:
        return f"nothing is running: the run is complete at step {state.step}"
    saved = state.checkpoint
    words = f"step {saved} is saved: run the same command again to resume"
    return f"nothing is running; {words if saved else 'nothing is saved'}"


def state_json(states: Sequence[RunState]) -> str:
    return json.dumps([_plain(state) for state in states], indent=2, allow_nan=False)


def _plain(state: RunState) -> dict[str, Any]:
    figures = {key: number(value) for key, value in state.figures.items()}
    record = asdict(state) | {"figures": figures, "active": state.active}
    if state.evaluation:
        record["evaluation"]["accuracy"] = number(state.evaluation.accuracy)
    return record


def state_lines(state: RunState) -> list[str]:
    """For a person: what runs it, how far it is, what is safe, what was remarkable."""
    starts = [f"  {s.name}: {' '.join(filter(None, (s.state, s.detail)))}" for s in state.starts]
    again = f", attempt {state.attempts}" if state.attempts > 1 else ""
    lines = [f"{state.folder}{again}", *(starts or ["  nothing is known to have started it"])]
    if state.step:
        said = " ".join(f"{key} {value:.4g}" for key, value in state.figures.items())
        age = duration(state.step_age_s)
        lines.append(f"  step {state.step} of {state.steps}, {age} ago: {said}")
    else:
        lines.append(f"  no step of {state.steps} yet")
    if last := state.evaluation:
        when = f"after step {last.step}" if last.step else "before training"
        lines.append(f"  accuracy {when}: {100 * last.accuracy:.1f}% of {last.n}")
    behind = state.step - state.checkpoint
    saved = f"step {state.checkpoint}, {behind} steps behind" if state.checkpoint else "none yet"
    lines.append(f"  newest whole checkpoint: {saved}")
    if state.verdicts:
        counts = ", ".join(f"{count} {kind}" for kind, count in state.verdicts.items())
        lines.append(f"  remarkable: {counts}; last: {state.last_verdict}")
    return lines
