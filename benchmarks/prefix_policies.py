"""What each prefix policy reaches on SORT-CHAIN, and at what cost, through the real path.

    python benchmarks/prefix_policies.py [--quick] [--policies a,b] [--students A,B] [--seeds 0,1,2]
        [--lr 1e-3] [--steps 200] [--json FILE] [--cache FOLDER]

Every cell is a whole run of recipes/quickstart.py: rollouts from SGLang, student and teacher in
Megatron ranks, greedy answers to 500 held-out prompts through the server at the end. A seed moves
the order of the prompts and the sampling; the checkpoints stay. FLOPs and tokens are those of
training, by the run's own ledger. Rates are from 0 to 1; execution is over valid plans.

Finished cells are kept in the cache and not run again, and a stopped one goes on where it was.
``--quick`` is student A with one seed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_prefix.config import Recipe
from megatron_prefix.jsonl import EVALUATION_FOLDER, read_records
from megatron_prefix.recipe import fingerprint, load_recipe
from megatron_prefix.rollout.server import Server, server_pool
from megatron_prefix.run_history import load_run, summarise
from megatron_prefix.tasks import sort_chain

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "quickstart.py"
WARMUP_STEPS, SHORT, FULL = 10, 9, sort_chain.RESPONSE_LENGTH
_FULL = ("prefix.policy=fixed", f"prefix.min_length={FULL}")
_PROBED = "log.probe_interval=10"
_ADAPTIVE, _ON_TAIL = ("prefix.policy=adaptive", _PROBED), ("shrink", "grow", "hold")
_CUT = ("prefix.cut_off.rule=surprisal", "prefix.cut_off.window=8", "prefix.cut_off.min_tokens=9")
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
    "marginal": ("prefix.policy=marginal", "prefix.min_length=4"),
    **{f"adaptive_{to}": (*_ADAPTIVE, f"prefix.adaptive.on_tail={to}") for to in _ON_TAIL},
    "audited": ("prefix.policy=audited", _PROBED),
    **{f"full_{to}": (*_FULL, f"loss.weights.rule={to}") for to in ("discrepancy", "change_point")},
    "cut": (*_FULL, *_CUT),
    "window": ("prefix.policy=window", f"prefix.window.start={FULL - SHORT}"),
}
DEFAULT = ("full", "fixed", "linear", "adaptive", "anchored", "late", "marginal")
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
    def student_folder(self) -> Path:
        return sort_chain.model_folder(f"student_{self.student.lower()}")


@dataclass(frozen=True)
class Quality:
    """Shares of the held-out prompts, but for execution: of those with a valid plan."""

    accuracy: float
    plan: float
    execution: float | None  # None: no plan was valid


@dataclass(frozen=True)
class Row:
    policy: str
    student: str
    seed: int
    lr: float
    accuracy: float
    plan: float
    execution: float | None
    flops: float
    tokens: int  # sampled prefix tokens


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
        f"prefix.min_length={SHORT}",
        f"prefix.max_length={FULL}",
        *POLICIES[cell.policy],
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


def quality_of(answers: Path) -> Quality:
    """Scores an evaluation's samples against the held-out problems they answer."""
    problems = sort_chain.make_problems(sort_chain.NUM_HELD_OUT, sort_chain.HELD_OUT_SEED)
    scored = []
    for record in read_records(answers):
        problem = problems[record["row"]]
        assert problem.prompt == record["prompt"], f"{answers}: row {record['row']}"
        end = "$" if record["finish_reason"] == "stop" else ""
        scored.append(sort_chain.score(problem, record["generated"] + end))
    executed = [score.execution for score in scored if score.valid_plan]
    return Quality(
        accuracy=statistics.fmean(score.accuracy for score in scored),
        plan=statistics.fmean(score.plan for score in scored),
        execution=statistics.fmean(executed) if executed else None,
    )


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
        flops=summary.flops,
        tokens=summary.tokens_sampled,
    )


def answers_after(folder: Path, step: int) -> Path:
    return folder / EVALUATION_FOLDER / f"step_{step:08d}.jsonl"


def is_finished(cell: Cell, folder: Path) -> bool:
    """The evaluation after the last step is the last thing that a run writes of what is read."""
    return answers_after(folder, cell.steps).is_file()


class RunFailed(RuntimeError):
    """A cell's run ended with an exit code; the message names its log."""


def run_cell(cell: Cell, folder: Path, cache: Path, server: list[str]) -> None:
    """Runs the cell's training to its end; the console's lines go beside ``folder``."""
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
            code = process.wait()
        except KeyboardInterrupt:  # the terminal told it as well: it saves
            process.wait()
            raise
    if code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RunFailed(f"{cell.name} ended with exit code {code}; log: {log}; {' '.join(last)}")


@contextlib.contextmanager
def one_server(recipe: Recipe, logs: Path) -> Iterator[list[str]]:
    """A server that several runs use one after another: each publishes its weights first."""
    with (
        tempfile.TemporaryDirectory(prefix="prefix-policies-") as scratch,
        server_pool(
            recipe.student.hf_path,
            recipe.rollout,
            params_dtype=recipe.student.params_dtype,
            log_folder=logs,
        ) as servers,
    ):
        yield server_settings(servers, Path(scratch, "key"))


def server_settings(servers: Sequence[Server], key_file: Path) -> list[str]:
    key_file.touch(mode=0o600)
    key_file.write_text(servers[0].endpoint.api_key)
    urls = ",".join(server.url for server in servers)
    return [f"rollout.server_urls=[{urls}]", f"rollout.api_key_file={key_file}"]


def run_missing(cells: Sequence[Cell], cache: Path, console: Console) -> None:
    """Runs what the cache does not hold, a student's cells on one server."""
    sort_chain.prepare_data(cache / "data")
    for student in STUDENTS:
        pairs = [(cell, folder_of(cell, cache)) for cell in cells if cell.student == student]
        missing = [(cell, folder) for cell, folder in pairs if not is_finished(cell, folder)]
        if not missing:
            continue
        recipe = load_recipe(str(RECIPE), overrides=overrides(missing[0][0], cache))
        with one_server(recipe, cache / "logs") as server:
            for number, (cell, folder) in enumerate(missing, start=1):
                console.print(f"student {student}: run {number} of {len(missing)}: {cell.name}")
                run_cell(cell, folder, cache, server)


def summary_table(rows: Iterable[Row], steps: int) -> Table:
    """One line a policy, student and learning rate: means over seeds, the spread of accuracy."""
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.student, row.lr, row.policy), []).append(row)
    table = Table(title=f"SORT-CHAIN, {steps} steps of 32, 500 held-out prompts")
    for name in ("student", "lr", "policy", "seeds", "accuracy %", "plan %", "execution %"):
        table.add_column(name, justify="left" if name in ("student", "policy") else "right")
    for name in ("GFLOP", "of full's", "k tokens"):
        table.add_column(name, justify="right")
    for (student, lr, policy), found in groups.items():
        flops = statistics.fmean(row.flops for row in found)
        full = [row.flops for row in groups.get((student, lr, "full"), [])]
        table.add_row(
            student,
            f"{lr:g}",
            policy,
            str(len(found)),
            "/".join(f"{100 * row.accuracy:.1f}" for row in found),
            percent([row.plan for row in found]),
            percent([row.execution for row in found if row.execution is not None]),
            f"{flops / 1e9:.0f}",
            f"{flops / statistics.fmean(full):.2f}" if full else "-",
            f"{statistics.fmean(row.tokens for row in found) / 1e3:.0f}",
        )
    return table


def percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.fmean(values):.1f}" if values else "-"


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
        print("stopped; the same command goes on", file=sys.stderr)
        return 75
    except RunFailed as error:
        print(f"prefix_policies: error: {error}", file=sys.stderr)
        return 1
    rows = [row_of(cell, folder_of(cell, cache)) for cell in cells]
    console.print(summary_table(rows, arguments.steps))
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
