"""``megatron-prefix eval`` with a real server: kept answers, resuming, and a run's own figures."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_prefix import eval_run
from megatron_prefix.evaluate import EvalSample, EvalSet
from megatron_prefix.prefix import Ledger, model_shape
from megatron_prefix.rollout.protocol import Sampling
from megatron_prefix.rollout.server import Server
from megatron_prefix.scorers import Generated
from megatron_prefix.tasks import sort_chain
from megatron_prefix.tokenizers import load_tokenizer, write_byte_tokenizer
from megatron_prefix.types import Prompt

PROBLEMS = EvalSet(
    prompts=tuple(Prompt(index=i, row=2 * i, input_ids=(40 + i, 50, 60)) for i in range(12)),
    answers=tuple("abcdefghijkl"),
    dropped=0,
)
STEPS, SAMPLES = 2, 40


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


def test_evaluating_the_export_gives_the_runs_own_answers(tmp_path: Path) -> None:
    files = sort_chain.prepare_data(tmp_path / "data")
    settings = {
        "run.name": "short",
        "run.output_dir": tmp_path,
        "student.hf_path": sort_chain.model_folder("student_b"),
        "data.path": files.train,
        "eval.path": files.held_out,
        "eval.samples": SAMPLES,
        "train.steps": STEPS,
        "optimizer.lr_warmup_steps": 1,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    trained = command("train", "quickstart", *words)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    run = tmp_path / "short"
    own = (run / "evaluations" / f"step_{STEPS:08d}.jsonl").read_text().splitlines()
    assert len(own) == SAMPLES
    evaluated = command("eval", str(run), "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    answers = (run / "evals" / "held_out" / "samples.jsonl").read_text().splitlines()
    inside, offline = (
        {(row := json.loads(line))["row"]: row for line in lines} for lines in (own, answers)
    )
    assert inside == offline
    summary = json.loads(evaluated.stdout)
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").open()]
    assert summary["accuracy"] == evaluations[-1]["accuracy"]
    assert summary["truncated"] == evaluations[-1]["truncated"]
    shape = model_shape(json.loads((run / "hf" / "config.json").read_text()))
    answered = [(sort_chain.PROMPT_LENGTH, answer["tokens"]) for answer in inside.values()]
    cost = Ledger(shape, shape, 75).measure_answers(answered).total
    assert evaluations[-1]["flops"] == cost
    ledger = json.loads((run / "ledger.json").read_text())
    assert ledger["evaluation"] == sum(each["flops"] for each in evaluations)
    assert summary["interval"][0] < summary["accuracy"] < summary["interval"][1]
    again = command("eval", str(run), "--json")  # nothing is left to ask: no server starts
    assert json.loads(again.stdout)["accuracy"] == summary["accuracy"]
    assert "starting" in evaluated.stderr and "starting" not in again.stderr
