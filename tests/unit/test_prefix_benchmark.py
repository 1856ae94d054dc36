"""The prefix benchmark but for its runs: cells, what a cell hangs on, rows out of a run folder."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import prefix_policies as benchmark
from benchmarks._policy_rows import verdicts
from benchmarks._quality import Quality
from benchmarks._teacher_answers import writing_flops
from megatron_prefix.evaluation.evaluate import EvalSample, write_samples
from megatron_prefix.prefix import build_policy, loss_start
from megatron_prefix.recipe import load_recipe
from megatron_prefix.tasks import sort_chain

CELL = benchmark.Cell("anchored", "A", 0, 1e-3, 200)


def answer(row: int, problem: sort_chain.Problem, generated: str) -> EvalSample:
    ended = generated.endswith("$")
    reason = "stop" if ended else "length"
    text = generated.removesuffix("$")
    return EvalSample(row, problem.prompt, text, problem.answer, ended, True, reason, 75)


@pytest.mark.parametrize("policy", benchmark.POLICIES)
def test_every_policy_is_a_sound_recipe(policy: str, tmp_path: Path) -> None:
    cell = replace(CELL, policy=policy)
    words = benchmark.overrides(cell, tmp_path)
    recipe = load_recipe(str(benchmark.RECIPE), overrides=words)
    lengths = [build_policy(recipe.prefix, 200).length(step) for step in range(200)]
    assert max(lengths) <= 75 and recipe.optimizer.min_lr == pytest.approx(1e-4)
    expected = {"full": (75, 75), "fixed": (9, 9), "fixed_37": (37, 37), "window": (75, 75)}
    expected |= {f"full_{rule}": (75, 75) for rule in ("discrepancy", "change_point", "relaxed")}
    expected |= {"anchored_12": (7, 75), "off_policy": (75, 75), "sft": (75, 75)}
    expected |= {"cut": (75, 75), "audited": (9, 9), "overlap": (9, 9), "marginal": (75, 75)}
    grown = (9, 9) if policy.startswith("adaptive") else (9, 75)  # that moves with the KL alone
    assert (min(lengths), max(lengths)) == expected.get(policy, grown)
    start = loss_start(build_policy(recipe.prefix, 200), 0)
    assert start == (66 if policy == "window" else 0)


def test_quick_is_one_student_with_one_seed_and_words_win() -> None:
    def cells(*words: str) -> list[benchmark.Cell]:
        return benchmark.cells_of(benchmark.parse(words))

    assert len(cells()) == 9 * 2 * 3
    quick = cells("--quick")
    assert len(quick) == 9
    assert {(cell.student, cell.seed) for cell in quick} == {("A", 0)}
    some = cells("--quick", "--students", "B", "--policies", "full,late", "--lr", "1e-3,2e-3")
    assert {(cell.policy, cell.student, cell.lr) for cell in some} == {
        (policy, "B", lr) for policy in ("full", "late") for lr in (1e-3, 2e-3)
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--policies", "ful"], "--policies: 'ful' is not one of full"),
        (["--students", "C"], "--students: 'C'"),
        (["--seeds", "0,x"], "--seeds and --lr are numbers"),
        (["--steps", "1"], "--steps 1 must be at least 2"),
    ],
)
def test_words_that_make_no_benchmark_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmark.parse(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_cells_folder_hangs_on_whatever_its_result_does(tmp_path: Path) -> None:
    one = benchmark.folder_of(CELL, tmp_path)
    assert one == benchmark.folder_of(CELL, tmp_path)
    changes = [{"seed": 1}, {"lr": 2e-3}, {"policy": "late"}, {"steps": 8}, {"student": "B"}]
    others = {benchmark.folder_of(replace(CELL, **change), tmp_path) for change in changes}
    assert len(others | {one}) == 6
    assert not benchmark.is_finished(CELL, one)


def test_quality_is_the_tasks_own_score(tmp_path: Path) -> None:
    first, second, third = sort_chain.make_problems(
        sort_chain.NUM_HELD_OUT, sort_chain.HELD_OUT_SEED
    )[:3]
    digit_of = dict(zip(second.prompt[1:-1:2], map(int, second.prompt[2:-1:2]), strict=True))
    wrong_plan = sort_chain.response_of("".join(sorted(digit_of, reverse=True)), digit_of)
    answers = [
        answer(0, first, first.response),
        answer(1, second, wrong_plan),
        answer(2, third, third.response[:40]),
    ]
    write_samples(tmp_path / "evaluations" / "step.jsonl", answers)
    quality = benchmark.quality_of(tmp_path / "evaluations" / "step.jsonl")
    assert quality.accuracy == pytest.approx(1 / 3)
    assert quality.plan == pytest.approx(2 / 3)
    assert quality.execution == pytest.approx(2 / 3)  # the second executes its wrong plan
    write_samples(tmp_path / "none.jsonl", [answer(0, first, "abc")])
    assert benchmark.quality_of(tmp_path / "none.jsonl") == Quality(0.0, 0.0, None)


def test_answers_to_other_problems_are_no_evaluation_of_these(tmp_path: Path) -> None:
    (problem,) = sort_chain.make_problems(1, seed=5)
    write_samples(tmp_path / "step.jsonl", [answer(0, problem, problem.response)])
    with pytest.raises(AssertionError, match="row 0"):
        benchmark.quality_of(tmp_path / "step.jsonl")


def test_a_row_is_read_from_the_run_folder(tmp_path: Path) -> None:
    cell = replace(CELL, steps=2)
    flops = {"rollout": 1e9, "teacher": 2e9, "student": 3e9}
    steps = [
        {"step": step, "kl_by_position": [0.5], "tokens_by_position": [32], "flops": flops}
        | {"prefix_length": 1, "prefix_tokens": 32, "flops_full": flops, "seconds": {"sync": 1.0}}
        for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    problems = sort_chain.make_problems(sort_chain.NUM_HELD_OUT, sort_chain.HELD_OUT_SEED)
    answers = [answer(i, p, p.response if i < 125 else "") for i, p in enumerate(problems)]
    write_samples(benchmark.answers_after(tmp_path, 2), answers)
    row = benchmark.row_of(cell, tmp_path)
    assert row == benchmark.Row("anchored", "A", 0, 1e-3, 0.25, 0.25, 1.0, 12e9, 64)
    assert benchmark.is_finished(cell, tmp_path)
    full = replace(row, policy="full", flops=24e9)
    console = Console(width=120, record=True, file=(tmp_path / "shown").open("w"))
    console.print(benchmark.summary_table([full, row, replace(row, seed=1)], 2))
    shown = console.export_text()
    assert "25.0/25.0" in shown and " 0.50 " in shown


def row(policy: str, accuracy: float, flops: float, **other: object) -> benchmark.Row:
    values = {"student": "A", "seed": 0, "lr": 1e-3, "plan": 0.9, "execution": 1.0, "tokens": 100}
    return benchmark.Row(policy=policy, accuracy=accuracy, flops=flops, **(values | other))


def told(*rows: benchmark.Row) -> dict[str, tuple[str, str]]:
    return {goal: (measured, verdict) for goal, measured, verdict in verdicts(rows)}


def test_goals_are_told_as_they_are() -> None:
    full = [row("full", accuracy, 100.0, seed=i) for i, accuracy in enumerate((0.6, 0.95, 0.9))]
    found = told(*full, row("anchored", 0.88, 33.0), row("adaptive", 0.86, 58.0))
    assert found["A: full reaches 80%"] == ("90.0%", "met")  # the median
    assert found["A: anchored within 3 points of full at 0.40x"] == ("-2.0 points, 0.33x", "met")
    assert found["A: adaptive within 3 points of full at 0.60x"][1] == "MISSED"
    assert found["A: late reaches 85% at 0.45x"] == ("", "not measured")
    late = told(*full, row("late", 0.9, 46.0), row("fixed", 0.324, 23.0, plan=0.99))
    assert late["A: late reaches 85% at 0.45x"] == ("90.0%, 0.46x", "MISSED")
    fixed = late["A: fixed at 9 has plan 88% or more and accuracy 20% or less"]
    assert fixed == ("plan 99.0%, accuracy 32.4%", "MISSED")


def test_the_policy_beyond_counts_with_its_best_rate_and_on_b_for_no_more_flops() -> None:
    full = [row("full", 0.90, 100.0), row("full", 0.97, 100.0, lr=2e-3)]
    short = [row("anchored_12", 0.96, 27.0), row("anchored_12", 0.93, 27.0, lr=2e-3)]
    goal = "A: anchored_12 within 1 point of full at 0.30x, each at its best lr"
    assert told(*full, *short)[goal] == ("-1.0 points, 0.27x", "met")
    on_b = [row("full", 0.67, 100.0, student="B"), row("anchored_12", 0.6, 30.0, student="B")]
    of_b = "B: anchored_12 within 3 points of full for no more FLOPs"
    assert told(*on_b)[of_b] == ("-7.0 points, 0.30x", "not measured")
    longer = [on_b[0], row("anchored_12", 0.6, 95.0, student="B")]
    assert told(*longer)[of_b] == ("-7.0 points, 0.95x", "MISSED")
    better = [on_b[0], row("anchored_12", 0.7, 70.0, student="B")]
    assert told(*better)[of_b] == ("+3.0 points, 0.70x", "met")
    dearer = [on_b[0], row("anchored_12", 0.7, 120.0, student="B")]
    assert told(*dearer)[of_b] == ("+3.0 points, 1.20x", "not measured")


def test_a_kept_row_needs_no_folder(tmp_path: Path) -> None:
    folder = benchmark.folder_of(CELL, tmp_path)
    assert not benchmark.is_finished(CELL, folder)
    kept = row("anchored", 0.5, 1.0, execution=None)
    folder.with_name(f"{folder.name}.json").write_text(json.dumps(asdict(kept)))
    assert benchmark.is_finished(CELL, folder)
    assert benchmark.kept_row(CELL, folder) == kept


def test_written_policies_read_the_teachers_answers_and_pay_for_them(tmp_path: Path) -> None:
    cell = replace(CELL, policy="sft")
    words = benchmark.overrides(cell, tmp_path)
    recipe = load_recipe(str(benchmark.RECIPE), overrides=words)
    assert recipe.mode.name == "sft"
    assert recipe.mode.written.path == str(tmp_path / "data" / "teacher_6400.jsonl")
    assert cell.rollouts == 6400 == recipe.train.steps * recipe.train.global_batch_size
    assert writing_flops(10) == pytest.approx(10 * writing_flops(1)) and writing_flops(1) > 1e7
