"""Pictures with every run in them: accuracy and its price, learning, cost, time."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_prefix.evaluation.pass_at_k import wilson_interval
from megatron_prefix.report import picture
from megatron_prefix.report.figure import step_axis, unit_of
from megatron_prefix.report.mean_kl import ANCHOR_WORDS, anchors, draw_mean_kl, one_width
from megatron_prefix.report.picture import INK, MUTED, Picture
from megatron_prefix.report.story import RunStory
from megatron_prefix.report.tables import si
from megatron_prefix.run_files.account import PARTS, Account
from megatron_prefix.run_files.history import RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KL_LEAST = 1e-6  # below it a logarithmic axis shows noise
_WORDS_WIDE = 0.16  # of the longest bar: what the words beside one take


def accuracy_picture(stories: Sequence[RunStory]) -> Picture:
    """Accuracy against FLOPs and against seconds; intervals are Wilson's, of 95%."""

    def paint(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_accuracy(left, stories, lambda history: history.flops.sum(axis=1).cumsum(), "FLOP")
        _draw_accuracy(right, stories, training_seconds, "s")
        left.set_ylabel("accuracy, %")
        _legend(left, stories)

    return picture.draw(
        "accuracy",
        paint,
        (11, 4.1),
        words="accuracy of each run against its training FLOPs and against its training time",
        caption="Held-out accuracy against what training had cost by then: FLOPs and seconds of the"
        " steps, evaluations and probes left out. Bars are 95% intervals.",
    )


def _draw_accuracy(
    axes: "Axes", stories: Sequence[RunStory], price: Callable[[RunHistory], np.ndarray], unit: str
) -> None:
    top = max(float(price(story.history)[-1]) for story in stories)
    factor, label = (
        (unit_of(top)[0], f"{unit_of(top)[1]}FLOP") if unit == "FLOP" else time_unit(top)
    )
    shown = False
    for index, story in enumerate(stories):
        found = [e for e in story.history.evaluations if np.isfinite(e.accuracy) and e.n]
        if not found:
            continue
        shown = True
        spent = np.concatenate([[0.0], price(story.history)]) / factor
        at = np.searchsorted(story.history.step, [e.step for e in found], side="right")
        mean = np.array([100 * e.accuracy for e in found])
        bounds = np.array([wilson_interval(e.accuracy * e.n, e.n) for e in found])
        spread = np.abs(100 * bounds.T - mean)
        style = picture.run_style(index)
        axes.errorbar(spent[at], mean, yerr=spread, lw=1.8, ms=5, elinewidth=1, capsize=2, **style)
    if not shown:
        picture.say(axes, "no run was evaluated")
        return
    axes.set_ylim(0, 102)
    axes.set_xlim(left=-0.02 * top / factor)
    axes.set_xlabel(label if unit == "FLOP" else f"training time, {label}")
    axes.set_title("Accuracy against FLOPs" if unit == "FLOP" else "Accuracy against time")


def training_seconds(history: RunHistory) -> np.ndarray:
    """[S], cumulative over the steps' phases."""
    return np.sum(list(history.seconds.values()), axis=0).cumsum()


def time_unit(seconds: float) -> tuple[float, str]:
    for factor, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * factor:
            return factor, name
    return 1.0, "seconds"


def learning_picture(stories: Sequence[RunStory]) -> Picture:
    """Mean KL and prefix length by step."""

    width = one_width([story.history for story in stories])

    def paint(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2)
        _draw_kl(left, stories, width)
        for index, story in enumerate(stories):
            history = story.history
            style = {**picture.run_style(index), "marker": _marker(history)}
            right.plot(history.step, history.prefix_length, ds="steps-mid", lw=1.3, **style)
        right.set_ylim(0)
        step_axis(right)
        right.set_ylabel("tokens")
        right.set_title("Prefix length")
        _legend(left, stories)

    return picture.draw(
        "learning",
        paint,
        (11, 4.1),
        words="mean KL a token and prefix length of each run by step",
        caption=f"The KL is the mean over the tokens in the loss{_smoothed(width)}; a longer prefix"
        " is another mean, so a jump may be no change of the student. Points: the longest steps of"
        " a run where its other steps are shorter.",
    )


def _smoothed(width: int) -> str:
    return f", smoothed over {width} steps of every run" if width > 1 else ""


def _draw_kl(axes: "Axes", stories: Sequence[RunStory], width: int) -> None:
    seen = []
    for index, story in enumerate(stories):
        style = picture.run_style(index)
        line = {**style, "lw": 1.5, "marker": _marker(story.history)}
        points = {"color": style["color"], "marker": style["marker"]}
        kl = draw_mean_kl(axes, story.history, width, line=line, points=points)
        seen.append(kl[np.isfinite(kl) & (kl > _KL_LEAST)])
    values = np.concatenate(seen)
    if len(values):
        picture.plain_log_ticks(axes, values.min() / 1.3, values.max() * 1.3)
    step_axis(axes)
    axes.set_ylabel("nats a token")
    axes.set_title("Mean KL")
    if any(anchors(story.history).any() for story in stories):
        axes.plot([], [], color=MUTED, lw=1.5, label="other steps")
        axes.plot([], [], color=MUTED, marker="o", ms=3.5, ls="", label=ANCHOR_WORDS)
        picture.legend_beside_title(axes)


def _marker(history: RunHistory) -> str:
    """A single step is a point, for a line of it cannot be seen."""
    return "" if len(history.step) > 1 else "o"


def cost_picture(stories: Sequence[RunStory]) -> Picture:
    """FLOPs by part, a bar a run, with the full-length counterfactual's length marked."""
    accounts = [story.account for story in stories]

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        top = max(max(account.total, account.flops_full.total) for account in accounts)
        factor, prefix = unit_of(top)
        for row, account in enumerate(accounts):
            _draw_account(axes, row, account, top)
        axes.set_yticks(range(len(stories)), [picture.shown_label(s.label, 28) for s in stories])
        axes.set_ylim(len(stories) - 0.45, -0.55)
        axes.set_xlim(0, (1 + _WORDS_WIDE) * top / factor)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{prefix}FLOP")
        handles = [_patch(picture.PART_COLOURS[part], part) for part in PARTS]
        axes.legend(
            handles=[*handles, _line("training at full length")], ncols=6, loc="lower left",
            bbox_to_anchor=(0, 1.0), borderaxespad=0.2, handlelength=1.3, columnspacing=1.4,
        )  # fmt: skip

    return picture.draw(
        "cost",
        paint,
        (11, 1.35 + 0.52 * len(stories)),
        words="FLOPs of each run by part, beside what its training would have cost at full length",
        caption="Beside each bar: training's FLOPs as a share of what the same steps would have"
        " cost with full-length rollouts, an upper bound. Probes and evaluations are no part of"
        " that share.",
    )


def _draw_account(axes: "Axes", row: int, account: Account, top: float) -> None:
    """``top``: FLOPs of the longest bar or mark of all runs."""
    left, factor = 0.0, unit_of(top)[0]
    for part in PARTS:
        value = account.by_part[part] / factor
        if np.isfinite(value) and value:
            axes.barh(row, value, left=left, height=0.56, color=picture.PART_COLOURS[part])
            left += value
    full = account.flops_full.total / factor
    axes.plot([full, full], [row - 0.36, row + 0.36], color=INK, lw=2)
    # At its bar, whose share it is, unless the mark stands in its way.
    at = full if left <= full < left + _WORDS_WIDE * top / factor else left
    words = f"{account.ratio:.2f}\u00d7 of {si(account.flops_full.total)}"
    axes.annotate(words, (at, row), (7, 0), textcoords="offset points", va="center", color=INK)


def time_picture(stories: Sequence[RunStory]) -> Picture:
    """Mean seconds of a step by phase, a bar a run."""
    phases = list(dict.fromkeys(phase for s in stories for phase in s.history.seconds))

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        for row, story in enumerate(stories):
            left = 0.0
            for number, phase in enumerate(phases):
                seconds = float(np.mean(story.history.seconds.get(phase, np.zeros(1))))
                colour = picture.part_colour(phase, number)
                axes.barh(row, seconds, left=left, height=0.56, color=colour)
                left += seconds
            axes.annotate(
                f"{left:.3g} s", (left, row), (6, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(stories)), [picture.shown_label(s.label, 28) for s in stories])
        axes.set_ylim(len(stories) - 0.45, -0.55)
        axes.margins(x=0.1)
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("seconds a step, mean of all steps")
        axes.legend(
            handles=[_patch(picture.part_colour(p, i), p) for i, p in enumerate(phases)], ncols=8,
            loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2, handlelength=1.3,
            columnspacing=1.4,
        )  # fmt: skip

    return picture.draw(
        "time",
        paint,
        (11, 1.35 + 0.52 * len(stories)),
        words="mean seconds of each run's steps by phase",
        caption="The mean of each phase over all of the run's steps, short and long. Where servers"
        " sample beside the step, only the time that the step waited for them is rollout.",
    )


def _legend(axes: "Axes", stories: Sequence[RunStory]) -> None:
    from matplotlib.lines import Line2D

    figure = axes.get_figure()
    assert figure is not None
    if len(stories) == 1:
        return
    handles = [
        Line2D([], [], lw=1.8, ms=5, label=picture.shown_label(s.label), **picture.run_style(i))
        for i, s in enumerate(stories)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(stories), 4))


def _patch(colour: str, label: str):  # type: ignore[no-untyped-def]
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _line(label: str):  # type: ignore[no-untyped-def]
    from matplotlib.lines import Line2D

    return Line2D([], [], color=INK, lw=2, label=label, marker="|", ls="", ms=12, mew=2)
