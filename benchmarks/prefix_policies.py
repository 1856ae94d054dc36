"""What each prefix policy reaches on SORT-CHAIN, and at what cost, through the real path.

    python benchmarks/prefix_policies.py [--quick] [--policies a,b] [--students A,B] [--seeds 0,1,2]
        [--lr 1e-3] [--steps 200] [--json FILE] [--cache FOLDER]

Every cell is a whole run of recipes/quickstart.py: rollouts from SGLang, student and teacher in
Megatron ranks, greedy answers to 500 held-out prompts through the server at the end. A seed moves
the order of the prompts and the sampling; the checkpoints stay. FLOPs and tokens are those of
training, by the run's own ledger. Rates are from 0 to 1; execution is over valid plans.

``off_policy`` (forward KL) and ``sft`` learn from the teacher's own answers to as many prompts,
sampled once; their FLOPs hold the teacher's sampling. Finished cells are kept in the cache, a
JSON file each, and not run again; a stopped one goes on where it was. ``--quick`` is student A with
one seed.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks._one_server import one_server
from benchmarks._policy_rows import Row, goals_table, summary_table
from benchmarks._quality import quality_of
from benchmarks._teacher_answers import answers_file, write_answers, writing_flops
from megatron_prefix.recipe import fingerprint, load_recipe
from megatron_prefix.run_files.history import load_run, summarise
from megatron_prefix.run_files.jsonl import EVALUATION_FOLDER, METRICS, read_records
from megatron_prefix.tasks import sort_chain

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "quickstart.py"
WARMUP_STEPS, BATCH, SHORT, FULL = 10, 32, 9, sort_chain.RESPONSE_LENGTH
_FULL = ("prefix.policy=fixed", f"prefix.min_length={FULL}")
_PROBED = "log.probe_interval=10"
_ADAPTIVE, _ON_TAIL = ("prefix.policy=adaptive", _PROBED), ("shrink", "grow", "hold")
_CUT = ("prefix.cut_off.rule=surprisal", "prefix.cut_off.window=8", "prefix.cut_off.min_tokens=9")
_RELAXED = ("loss.divergence=relaxed_kl", "loss.weights.rule=entropy", "loss.weights.explore=0.5")
# fmt: off
POLICIES: dict[str, tuple[str, ...]] = {
    "full": _FULL,
    "fixed": ("prefix.policy=fixed",),
    "fixed_37": ("prefix.policy=fixed", "prefix.min_length=37"),
    "linear": ("prefix.policy=linear", "prefix.linear.over=0.8"),
    "steps": ("prefix.policy=steps", "prefix.steps.stages=4", "prefix.steps.over=0.8"),
    "cosine": ("prefix.policy=cosine", "prefix.cosine.over=0.8"),
    "adaptive": ("prefix.policy=adaptive", "prefix.adaptive.factor=1.5"),
    "anchored": ("prefix.policy=anchored", "prefix.anchored.every=8"),
    "late": ("prefix.policy=late", "prefix.late.full_after=0.8"),
    "off_policy": ("prefix.policy=fixed", f"prefix.min_length={FULL}", "mode.name=off_policy",
                   "loss.divergence=forward_kl"),
    "sft": ("prefix.policy=fixed", f"prefix.min_length={FULL}", "mode.name=sft"),
    "anchored_12": ("prefix.policy=anchored", "prefix.min_length=7", "prefix.anchored.every=12"),
    "marginal": ("prefix.policy=marginal", "prefix.min_length=4"),
    **{f"adaptive_{to}": (*_ADAPTIVE, f"prefix.adaptive.on_tail={to}") for to in _ON_TAIL},
    "audited": ("prefix.policy=audited", _PROBED),
    **{f"full_{to}": (*_FULL, f"loss.weights.rule={to}") for to in ("discrepancy", "change_point")},
    "full_relaxed": (*_FULL, *_RELAXED),
    "overlap": ("prefix.policy=overlap", "prefix.overlap_k=4", "prefix.overlap.window=8"),
    "cut": (*_FULL, *_CUT),
    "window": ("prefix.policy=window", f"prefix.window.start={FULL - SHORT}"),
}
# fmt: on
DEFAULT = (
    "full",
    "fixed",
    "linear",
    "adaptive",
    "anchored",
    "late",
    "marginal",
    "off_policy",
    "sft",
)
WRITTEN = ("off_policy", "sft")  # learn from the teacher's answers
STUDENTS = ("A", "B")


@dataclass(frozen=True)
class Cell:
    """One run."""

    policy: str
    student: str
    seed: int
    lr: float
    steps: int

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.student}-seed{self.seed}-lr{self.lr:g}-{self.steps}steps"

    @property
    def is_written(self) -> bool:
        return self.policy in WRITTEN

    @property
    def rollouts(self) -> int:
        return self.steps * BATCH

    @property
    def student_folder(self) -> Path:
        return sort_chain.model_folder(f"student_{self.student.lower()}")


def overrides(cell: Cell, cache: Path) -> list[str]:
    """What the cell lays over the quickstart's recipe, but for its servers and its folder."""
    files = sort_chain.data_files(cache / "data")
    return [
        f"student.hf_path={cell.student_folder}",
        f"data.path={files.train}",
        f"eval.path={files.held_out}",
        f"data.seed={cell.seed}",
        f"train.seed={cell.seed}",
        f"train.steps={cell.steps}",
        f"train.global_batch_size={BATCH}",
        f"prefix.min_length={SHORT}",
        f"prefix.max_length={FULL}",
        *POLICIES[cell.policy],
        *([f"mode.written.path={answers_file(cache, cell.rollouts)}"] if cell.is_written else []),
        f"optimizer.lr={cell.lr}",
        f"optimizer.min_lr={0.1 * cell.lr}",
        f"optimizer.lr_warmup_steps={min(WARMUP_STEPS, cell.steps // 2)}",
        "checkpoint.export_hf=false",
        "log.tensorboard=false",
        "log.log_interval=20",
    ]


def folder_of(cell: Cell, cache: Path) -> Path:
    """Named for all that the result hangs on: settings, step count, checkpoints."""
    recipe = load_recipe(str(RECIPE), overrides=overrides(cell, cache))
    parts = [fingerprint(recipe), str(recipe.train.steps), str(recipe.eval.samples)]
    for path in (recipe.student.hf_path, recipe.teacher.hf_path):
        weights = Path(path, "model.safetensors").read_bytes()
        parts.append(hashlib.sha256(weights).hexdigest())
    digest = hashlib.sha256(" ".join(parts).encode()).hexdigest()
    return cache / f"{cell.name}-{digest[:10]}"


def row_of(cell: Cell, folder: Path) -> Row:
    """The row of a finished run."""
    summary = summarise(load_run(folder))
    assert summary.steps == cell.steps, f"{folder} has {summary.steps} steps of {cell.steps}"
    quality = quality_of(answers_after(folder, cell.steps))
    return Row(
        cell.policy,
        cell.student,
        cell.seed,
        cell.lr,
        **asdict(quality),
        flops=summary.flops + (writing_flops(cell.rollouts) if cell.is_written else 0.0),
        tokens=summary.tokens_sampled,
    )


def kept_row(cell: Cell, folder: Path) -> Row:
    """The row out of the file that the cell left, or out of its run's folder, and left now."""
    kept = folder.with_name(f"{folder.name}.json")
    if not kept.is_file():
        row = row_of(cell, folder)
        kept.write_text(json.dumps(asdict(row), indent=2, allow_nan=False) + "\n")
    return Row(**json.loads(kept.read_text()))


def answers_after(folder: Path, step: int) -> Path:
    return folder / EVALUATION_FOLDER / f"step_{step:08d}.jsonl"


def is_finished(cell: Cell, folder: Path) -> bool:
    """The evaluation after the last step is the last thing that a run writes of what is read."""
    left = folder.with_name(f"{folder.name}.json")
    return left.is_file() or answers_after(folder, cell.steps).is_file()


class RunFailed(RuntimeError):
    """A cell's run ended with an exit code; the message names its log."""


def run_cell(
    cell: Cell, folder: Path, cache: Path, server: list[str], tick: Callable[[int], None]
) -> None:
    """Runs the cell's training to its end; the console's lines go beside ``folder``.

    ``tick`` is called with the steps that are done, now and then.
    """
    log = folder.with_name(f"{folder.name}.log")
    words = [*overrides(cell, cache), f"run.output_dir={cache}", f"run.name={folder.name}", *server]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_prefix.cli", "train", str(RECIPE), *words],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = None
            while code is None:
                tick(steps_in(folder))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    code = process.wait(timeout=1.0)
        except KeyboardInterrupt:  # the terminal told it as well: it saves
            process.wait()
            raise
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RunFailed(f"{cell.name} ended with exit code {code}; log: {log}; {' '.join(last)}")


def steps_in(folder: Path) -> int:
    return sum(1 for _ in read_records(folder / METRICS))


def run_missing(cells: Sequence[Cell], cache: Path, console: Console) -> None:
    """Runs what the cache does not hold, a student's cells on one server."""
    sort_chain.prepare_data(cache / "data")
    for student in STUDENTS:
        pairs = [(cell, folder_of(cell, cache)) for cell in cells if cell.student == student]
        missing = [(cell, folder) for cell, folder in pairs if not is_finished(cell, folder)]
        if not missing:
            continue
        if any(cell.is_written for cell, _ in missing):
            first = load_recipe(str(RECIPE), overrides=overrides(missing[0][0], cache))
            write_answers(first, cache, missing[0][0].rollouts)
        recipe = load_recipe(str(RECIPE), overrides=overrides(missing[0][0], cache))
        with one_server(recipe, cache / "logs") as server, _bar(console) as bar:
            total = sum(cell.steps for cell, _ in missing)
            task = bar.add_task(f"student {student}", total=total)
            for number, (cell, folder) in enumerate(missing):
                if not console.is_terminal:
                    console.print(f"student {student}: {number + 1} of {len(missing)}: {cell.name}")
                done = functools.partial(_show, bar, task, cell.name, number * cell.steps)
                run_cell(cell, folder, cache, server, done)
                kept_row(cell, folder)


def _show(bar: Progress, task: TaskID, name: str, before: int, steps: int) -> None:
    bar.update(task, completed=before + steps, description=name)


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    about = __doc__.partition("\n")[0] if __doc__ else ""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="student A, seed 0")
    parser.add_argument("--policies", default=",".join(DEFAULT), help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--students", help="default: A,B")
    parser.add_argument("--seeds", help="default: 0,1,2")
    parser.add_argument("--lr", default="1e-3", help="one or several, like 1e-3,2e-3")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "prefix_policies")
    arguments = parser.parse_args(argv)
    arguments.policies = arguments.policies.split(",")
    arguments.students = (arguments.students or ("A" if arguments.quick else "A,B")).split(",")
    seeds = arguments.seeds or ("0" if arguments.quick else "0,1,2")
    try:
        arguments.seeds = [int(seed) for seed in seeds.split(",")]
        arguments.lr = [float(lr) for lr in arguments.lr.split(",")]
    except ValueError as error:
        parser.error(f"--seeds and --lr are numbers with commas between them: {error}")
    for name, given, known in (
        ("--policies", arguments.policies, POLICIES),
        ("--students", arguments.students, STUDENTS),
    ):
        for each in given:
            if each not in known:
                parser.error(f"{name}: {each!r} is not one of {', '.join(known)}")
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps} must be at least 2")
    return arguments


def cells_of(arguments: argparse.Namespace) -> list[Cell]:
    return [
        Cell(policy, student, seed, lr, arguments.steps)
        for student in arguments.students
        for lr in arguments.lr
        for policy in arguments.policies
        for seed in arguments.seeds
    ]


def main(argv: Sequence[str] | None = None) -> int:
    arguments, console = parse(argv), Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe has none; the table needs 110
    cells, cache = cells_of(arguments), arguments.cache.resolve()
    try:
        run_missing(cells, cache, console)
    except KeyboardInterrupt:
        print("stopped: run the same command again to resume", file=sys.stderr)
        return 75
    except RunFailed as error:
        print(f"prefix_policies: error: {error}", file=sys.stderr)
        return 1
    rows = [kept_row(cell, folder_of(cell, cache)) for cell in cells]
    console.print(summary_table(rows, arguments.steps))
    console.print(goals_table(rows))
    for student in arguments.students:
        first = next(cell for cell in cells if cell.student == student)
        before = quality_of(answers_after(folder_of(first, cache), 0))
        console.print(f"student {student} before: accuracy {100 * before.accuracy:.1f}%")
    if arguments.json:
        record = {"steps": arguments.steps, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
