"""What the report's pictures draw, read from matplotlib's axes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from megatron_prefix.config import LogConfig
from megatron_prefix.report import comparison, of_one_run, picture, sections
from megatron_prefix.report.figure import ANCHOR_COLOUR, KL_COLOUR, draw_kl
from megatron_prefix.report.mean_kl import ANCHOR_WORDS, anchors, draw_mean_kl, one_width, smooth
from megatron_prefix.report.story import RunStory, load_stories
from megatron_prefix.run_files.history import load_run
from megatron_prefix.run_files.log import RunLog
from tests.run_folders import metrics, write_run

SHORT, LONG = 4, 20


def anchored_run(folder: Path, steps: int = 16) -> Path:
    """A long step after three short ones, of a tenth of their KL."""
    with RunLog(folder, LogConfig(tensorboard=False), steps, console=Console(quiet=True)) as log:
        for step in range(1, steps + 1):
            long = step % 4 == 0
            log.step(metrics(step, LONG if long else SHORT, (0.1 if long else 1.0) / step))
    return folder


@pytest.fixture
def painted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Figure]:
    """The figure that one of the report's functions paints."""

    def figure_of(draw: Callable[..., object], *given: object) -> Figure:
        figure = Figure()
        monkeypatch.setattr(picture, "draw", lambda name, paint, size, **words: paint(figure))
        draw(*given)
        return figure

    return figure_of


def stories(*runs: Path) -> tuple[RunStory, ...]:
    return load_stories(runs)


def test_long_steps_between_short_ones_are_anchors(tmp_path: Path) -> None:
    history = load_run(anchored_run(tmp_path / "anchored"))
    assert history.step[anchors(history)].tolist() == [4, 8, 12, 16]


@pytest.mark.parametrize("steps", [1, 6])
def test_a_prefix_that_grows_or_stays_has_no_anchors(tmp_path: Path, steps: int) -> None:
    growing = load_run(write_run(tmp_path / "growing", {}, steps=steps))
    assert len(growing.step) == steps and not anchors(growing).any()
    with RunLog(
        tmp_path / "same", LogConfig(tensorboard=False), steps, console=Console(quiet=True)
    ) as log:
        for step in range(1, steps + 1):
            log.step(metrics(step, LONG, 1.0))
    assert not anchors(load_run(tmp_path / "same")).any()


def test_the_line_leaves_anchors_out_and_they_are_points(tmp_path: Path) -> None:
    history = load_run(anchored_run(tmp_path / "run"))
    axes = Figure().subplots()
    drawn = draw_mean_kl(axes, history, 1, line={}, points={"marker": "s"})
    line, points = axes.lines
    short = history.step % 4 != 0
    np.testing.assert_array_equal(line.get_xdata(), history.step[short])
    np.testing.assert_allclose(line.get_ydata(), 1 / history.step[short], rtol=1e-5)
    np.testing.assert_array_equal(points.get_xdata(), [4, 8, 12, 16])
    np.testing.assert_allclose(points.get_ydata(), 0.1 / np.array([4, 8, 12, 16]), rtol=1e-5)
    assert (points.get_linestyle(), points.get_marker()) == ("None", "s")
    np.testing.assert_allclose(drawn, history.kl)


def test_the_quickstarts_picture_has_both_in_its_legend(tmp_path: Path) -> None:
    axes = Figure().subplots()
    draw_kl(axes, load_run(anchored_run(tmp_path / "run")))
    assert [line.get_color() for line in axes.lines] == [KL_COLOUR, ANCHOR_COLOUR]
    legend = axes.get_legend()
    assert legend is not None
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["KL of the short steps", "KL of the steps of 20 tokens"]
    plain = Figure().subplots()
    draw_kl(plain, load_run(write_run(tmp_path / "plain", {}, steps=1)))
    assert plain.get_legend() is None and len(plain.lines) == 1


def test_runs_of_unlike_lengths_are_smoothed_alike(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / str(n), {}, steps=n)) for n in (100, 250)]
    assert one_width(runs) == one_width(runs[:1]) == 2
    assert one_width(runs[1:]) == 5
    assert one_width([load_run(write_run(tmp_path / "few", {}, steps=3))]) == 1


def test_smoothing_leaves_nans_out() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0])
    np.testing.assert_allclose(smooth(values, 3), [1.0, 2.0, 4.0, 4.0])
    np.testing.assert_array_equal(smooth(values, 1), values)


def test_a_run_looks_alike_on_both_sides_of_the_learning_picture(
    tmp_path: Path, painted: Callable[..., Figure]
) -> None:
    runs = stories(anchored_run(tmp_path / "a"), anchored_run(tmp_path / "b"))
    kl, length = painted(comparison.learning_picture, runs).axes
    lines = [line for line in kl.lines if line.get_linestyle() != "None"][:2]
    for left, right in zip(lines, length.lines, strict=True):
        assert (left.get_color(), left.get_linestyle()) == (
            right.get_color(), right.get_linestyle()
        )  # fmt: skip
    assert lines[0].get_linestyle() != lines[1].get_linestyle()
    legend = kl.get_legend()
    assert legend is not None
    assert ANCHOR_WORDS in [text.get_text() for text in legend.get_texts()]


def test_the_ratio_stands_at_its_bar(tmp_path: Path, painted: Callable[..., Figure]) -> None:
    """Training's 36 GFLOP and an evaluation's 5 make the bar; full length is marked at 72."""
    (axes,) = painted(comparison.cost_picture, stories(write_run(tmp_path / "run", {0: 0.1}))).axes
    (words,) = axes.texts
    assert words.get_text() == "0.50\u00d7 of 72 G"
    assert words.xy[0] == pytest.approx(41)
    assert axes.lines[0].get_xdata()[0] == pytest.approx(72)
    near = write_run(tmp_path / "near", dict.fromkeys(range(5), 0.1))  # 25 more: the bar ends at 61
    (axes,) = painted(comparison.cost_picture, stories(near)).axes
    assert axes.texts[0].xy[0] == pytest.approx(72), "its words would cross the mark"


def test_times_are_means_where_long_steps_are_few(
    tmp_path: Path, painted: Callable[..., Figure]
) -> None:
    runs = stories(write_run(tmp_path / "run", {}, steps=4))
    runs[0].history.seconds["rollout"][:] = [1.0, 1.0, 1.0, 9.0]
    (axes,) = painted(comparison.time_picture, runs).axes
    assert axes.patches[0].get_width() == pytest.approx(3.0)
    assert axes.texts[0].get_text() == "3.25 s"
    table = str(sections.phase_rows(runs))
    assert "rollout: mean s, share" in table and "3.000 s, 92%" in table


def test_a_slow_step_is_cut_off_and_told(tmp_path: Path, painted: Callable[..., Figure]) -> None:
    (story,) = stories(write_run(tmp_path / "run", {}, steps=100))
    right = painted(of_one_run.growth_picture, story, 1).axes[1]
    assert right.get_title() == "Seconds a step, by phase" and not right.texts
    story.history.seconds["rollout"][0] = 30.0
    right = painted(of_one_run.growth_picture, story, 1).axes[1]
    assert right.get_ylim()[1] < 2
    assert right.texts[0].get_text() == "1 of 100 cut off, up to 30.2 s"
