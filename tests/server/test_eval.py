"""``megatron-prefix eval`` with a real server: kept answers, resuming, and a run's own figures."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_prefix.data.tokenizers import load_tokenizer, write_byte_tokenizer
from megatron_prefix.evaluation import run as eval_run
from megatron_prefix.evaluation.evaluate import EvalSample, EvalSet
from megatron_prefix.evaluation.scorers import Generated
from megatron_prefix.prefix import Ledger, model_shape
from megatron_prefix.rollout.protocol import Sampling
from megatron_prefix.rollout.records import load_record
from megatron_prefix.rollout.server import Server
from megatron_prefix.tasks import sort_chain
from megatron_prefix.types import Prompt

PROBLEMS = EvalSet(
    prompts=tuple(Prompt(index=i, row=2 * i, input_ids=(40 + i, 50, 60)) for i in range(12)),
    answers=tuple("abcdefghijkl"),
    dropped=0,
)
STEPS, MIDDLE, SAMPLES = 3, 1, 40
ROOT = Path(__file__).parents[2]


def contains(generated: Generated, answer: str) -> bool | None:
    return answer in generated.text if generated.text else None


@pytest.fixture
def questions(tmp_path: Path) -> eval_run.Questions:
    write_byte_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    return eval_run.Questions(PROBLEMS, 1, Sampling(16, 0.0, (2,)), tokenizer, contains)


def by_row(samples: list[EvalSample]) -> dict[tuple[int, int], EvalSample]:
    return {(sample.row, sample.sample): sample for sample in samples}


def test_answers_that_are_there_are_not_asked_again(
    server: Server, questions: eval_run.Questions, original_weights: None, tmp_path: Path
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    shown = Console(file=io.StringIO())
    for folder in (whole, stopped):
        folder.mkdir()
    every = by_row(eval_run.ask(questions, [server.endpoint], whole, shown))
    assert sorted(every) == [(2 * i, 0) for i in range(12)]
    lines = (whole / "samples.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 12
    # Marked, so that an answer asked anew would show.
    kept = [json.dumps(json.loads(line) | {"generated": "kept"}) + "\n" for line in lines[:5]]
    (stopped / "samples.jsonl").write_text("".join(kept) + lines[5][:20])
    again = by_row(eval_run.ask(questions, [server.endpoint], stopped, shown))
    assert len((stopped / "samples.jsonl").read_text().splitlines()) == 12
    assert sum(sample.generated == "kept" for sample in again.values()) == 5
    for key, sample in again.items():
        assert sample == every[key] or sample == replace(every[key], generated="kept")


def test_several_answers_a_problem_are_told_apart(
    server: Server, questions: eval_run.Questions, original_weights: None, tmp_path: Path
) -> None:
    several = replace(questions, samples_per_prompt=3, sampling=Sampling(16, 1.0, (2,)))
    samples = eval_run.ask(several, [server.endpoint], tmp_path, Console(file=io.StringIO()))
    assert sorted(by_row(samples)) == [(2 * i, n) for i in range(12) for n in range(3)]
    summary = eval_run.summarise(PROBLEMS, 3, samples)
    assert (summary.answers, list(summary.pass_at)) == (36, [1, 2, 3])
    assert len({sample.generated for sample in samples}) > 12


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_prefix.cli", *words],
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose evaluations have a server of their own; every step is saved, and stragglers are
    aborted."""
    root = tmp_path_factory.mktemp("trained")
    files = sort_chain.prepare_data(root / "data")
    settings = {
        "run.name": "short",
        "run.output_dir": root,
        "student.hf_path": sort_chain.model_folder("student_b"),
        "data.path": files.train,
        "rollout.num_servers": 2,
        "rollout.over_sample": 1.25,
        "rollout.record": "true",
        "eval.path": files.held_out,
        "eval.samples": SAMPLES,
        "eval.interval": 1,
        "eval.own_servers": 1,
        "checkpoint.save_interval": 1,
        "checkpoint.keep_last": 0,
        "train.steps": STEPS,
        "optimizer.lr_warmup_steps": 1,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    result = command("train", "quickstart", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    return root / "short"


def test_evaluating_an_exported_step_gives_the_runs_own_answers(trained: Path) -> None:
    """Those of an earlier step, which a server of its own gave while training went on."""
    export = trained / f"hf_step_{MIDDLE:08d}"
    checkpoint = trained / "checkpoints" / f"step_{MIDDLE:08d}"
    tool = [sys.executable, ROOT / "tools" / "convert_megatron_to_hf.py"]
    subprocess.run([*tool, "--checkpoint", checkpoint, "--output", export], check=True)
    evaluated = command("eval", str(trained), "--step", str(MIDDLE), "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    answers = trained / "evals" / f"held_out-step{MIDDLE}" / "samples.jsonl"
    inside, offline, end = (
        {(row := json.loads(line))["row"]: row for line in path.read_text().splitlines()}
        for path in (own_answers(trained, MIDDLE), answers, own_answers(trained, STEPS))
    )
    assert len(inside) == SAMPLES and inside == offline != end
    summary = json.loads(evaluated.stdout)
    told = evaluations(trained)[MIDDLE]
    assert summary["accuracy"] == told["accuracy"] and summary["truncated"] == told["truncated"]
    assert summary["interval"][0] < summary["accuracy"] < summary["interval"][1]
    # Nothing is left to ask: no server starts.
    again = command("eval", str(trained), "--step", str(MIDDLE), "--json")
    assert json.loads(again.stdout)["accuracy"] == summary["accuracy"]
    assert "starting" in evaluated.stderr and "starting" not in again.stderr


def test_every_evaluation_is_entered_once_with_what_it_cost(trained: Path) -> None:
    entered = evaluations(trained)
    lines = (trained / "evaluations.jsonl").read_text().splitlines()
    assert sorted(entered) == list(range(STEPS + 1)) and len(lines) == STEPS + 1
    shape = model_shape(json.loads((trained / "hf" / "config.json").read_text()))
    ledger = Ledger(shape, shape, 75)
    for step, told in entered.items():
        rows = [json.loads(line) for line in own_answers(trained, step).open()]
        answered = [(sort_chain.PROMPT_LENGTH, row["tokens"]) for row in rows]
        assert told["flops"] == ledger.measure_answers(answered).total
    account = json.loads((trained / "ledger.json").read_text())
    assert account["evaluation"] == sum(told["flops"] for told in entered.values())


def test_what_stragglers_sampled_is_in_the_runs_ledger(trained: Path) -> None:
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").open()]
    account = json.loads((trained / "ledger.json").read_text())
    assert all(step["discarded_tokens"] > 0 for step in steps)
    assert account["discarded_tokens"] == sum(step["discarded_tokens"] for step in steps)
    shape = model_shape(json.loads((trained / "hf" / "config.json").read_text()))
    ledger = Ledger(shape, shape, 75)
    for number, step in enumerate(steps):
        rollouts, recorded = load_record(trained / "rollouts", number)
        assert sum(sampled for _, sampled in recorded) == step["discarded_tokens"]
        wanted = [(len(each.prompt_ids), len(each.prefix_ids)) for each in rollouts]
        assert sum(sampled for _, sampled in wanted) == step["prefix_tokens"]
        assert step["flops"]["rollout"] > ledger.measure_answers(wanted).rollout


def own_answers(run: Path, step: int) -> Path:
    return run / "evaluations" / f"step_{step:08d}.jsonl"


def evaluations(run: Path) -> dict[int, dict[str, Any]]:
    return {(each := json.loads(line))["step"]: each for line in (run / "evaluations.jsonl").open()}
