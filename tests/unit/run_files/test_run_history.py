"""Run folders read back: history, summary, tables, the picture."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from megatron_prefix.config import LogConfig
from megatron_prefix.report.figure import (
    ACCURACY_COLOUR,
    KL_COLOUR,
    UNREACHED,
    quickstart_figure,
    unit_of,
)
from megatron_prefix.report.tables import phase_table, si, summary_table
from megatron_prefix.run_files.history import load_run, summarise, write_summary
from megatron_prefix.run_files.kl_grid import shrink
from megatron_prefix.run_files.log import RunLog
from megatron_prefix.types import Flops
from tests.run_folders import Answers, metrics, write_run


def test_a_history_holds_the_steps_in_order(tmp_path: Path) -> None:
    history = load_run(write_run(tmp_path, {0: 0.1, 6: 0.9}))
    assert history.step.tolist() == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(history.kl, 1 / history.step, rtol=1e-5)
    assert history.prefix_tokens.tolist() == [16, 24, 32, 40, 48, 56]
    assert np.isnan(history.kl_by_position[0][-1]) and len(history.kl_by_position[5]) == 8
    assert history.flops[0].tolist() == [1e9, 2e9, 3e9]
    assert history.flops_full.tolist() == [12e9] * 6
    assert history.seconds["rollout"].sum() == pytest.approx(3.0)


def test_a_step_evaluated_twice_counts_with_its_last_result(tmp_path: Path) -> None:
    write_run(tmp_path, {0: 0.1, 6: 0.5})
    with RunLog(tmp_path, LogConfig(tensorboard=False), 6, resume_step=6) as log:
        log.evaluation(6, Answers(0.75), Flops())
    accuracies = [evaluation.accuracy for evaluation in load_run(tmp_path).evaluations]
    assert accuracies == [0.1, 0.75]


def test_a_folder_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no step in metrics.jsonl"):
        load_run(tmp_path)


def test_the_summary_adds_up_and_is_strict_json(tmp_path: Path) -> None:
    summary = summarise(load_run(write_run(tmp_path, {0: 0.25, 6: 0.9})), seconds=12.5)
    write_summary(summary, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "steps": 6,
        "accuracy_before": 0.25,
        "accuracy_after": 0.9,
        "eval_prompts": 40,
        "tokens_sampled": 216,
        "flops": 36e9,
        "flops_full_opd": 72e9,
        "seconds": 12.5,
    }
    assert summary.flops_ratio == 0.5
    assert summarise(load_run(tmp_path)).seconds == pytest.approx(4.5)


def test_a_run_without_evaluations_has_no_accuracy(tmp_path: Path) -> None:
    summary = summarise(load_run(write_run(tmp_path, {})))
    write_summary(summary, tmp_path / "summary.json")
    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["accuracy_before"] is None and written["accuracy_after"] is None
    assert "accuracy" not in shown(summary_table(summary))


def test_tables_show_the_figures(tmp_path: Path) -> None:
    history = load_run(write_run(tmp_path, {0: 0.25, 6: 0.9}))
    text = shown(summary_table(summarise(history, seconds=61), "a run"))
    for expected in ("25.0%", "90.0%", "40 prompts", "216", "36 G", "72 G", "0.50", "1:01"):
        assert expected in text
    assert "66.7%" in shown(phase_table(history))


@pytest.mark.parametrize("evaluated", [{}, {6: 0.9}, {0: 0.1, 6: 0.9}, {0: 0.1, 3: 0.5, 6: 0.9}])
def test_the_picture_is_drawn(tmp_path: Path, evaluated: dict[int, float]) -> None:
    png = tmp_path / "run.png"
    quickstart_figure(write_run(tmp_path, evaluated), png)
    with Image.open(png) as image:
        assert image.format == "PNG" and image.size == (1650, 1080)
        colours = dict((c, n) for n, c in image.convert("RGB").getcolors(maxcolors=2**24) or [])
    assert colours[rgb(KL_COLOUR)] > 1000 and colours[rgb(UNREACHED)] > 1000
    assert (colours.get(rgb(ACCURACY_COLOUR), 0) > 500) == bool(evaluated)


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))


def test_the_picture_of_a_single_step_and_of_a_zero_kl(tmp_path: Path) -> None:
    with RunLog(tmp_path, LogConfig(tensorboard=False), 1, console=Console(quiet=True)) as log:
        log.step(metrics(1, 3, 0.0))
    quickstart_figure(tmp_path, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 0


def test_shrink_averages_neighbours_without_their_nans() -> None:
    grid = np.array([[1.0, 3.0, np.nan, 5.0, np.nan]])
    np.testing.assert_array_equal(shrink(grid, 3), [[2.0, 5.0, np.nan]])
    assert shrink(grid, 5) is grid


def test_units() -> None:
    assert [si(x) for x in (5e5, 2e9, 1.25e12, 3e21)] == ["0.5 M", "2 G", "1.25 T", "3 Z"]
    assert unit_of(999e9) == (1e9, "G")


def shown(table: object) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
