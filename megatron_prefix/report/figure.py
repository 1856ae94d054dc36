"""The picture of a run: how it learned, how long its prefixes were, what that cost."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_prefix.report.mean_kl import anchors, draw_mean_kl
from megatron_prefix.run_files.history import FLOPS_PARTS, RunHistory, load_run
from megatron_prefix.run_files.kl_grid import KL_CEILING, KL_FLOOR, shrink, stack_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#22303c"
FAINT = "#8a97a3"
KL_COLOUR = "#0b6e99"
ANCHOR_COLOUR = "#9c2c5a"
LENGTH_COLOUR = "#f3a361"
ACCURACY_COLOUR = "#2a9d6f"
PART_COLOURS = ("#f3a361", "#5b8fb9", "#0b6e99")  # by FLOPS_PARTS
UNREACHED = "#e8ebee"
MAX_CELLS = 400  # of the heat map's sides; more are averaged

STYLE = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


def quickstart_figure(run_folder: Path, png_path: Path) -> None:
    """Draws a run into ``png_path``: KL, prefix length, accuracy, FLOPs, KL by position.

    Raises ValueError where the folder holds no step.
    """
    # Figure itself, not pyplot: no window system and no state of the process is touched.
    import matplotlib
    from matplotlib.figure import Figure

    history = load_run(run_folder)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 7.2))
        figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
        axes = figure.subplots(2, 2)
        draw_kl(axes[0, 0], history)
        draw_accuracy(axes[0, 1], history)
        draw_flops(axes[1, 0], history)
        draw_heat_map(figure, axes[1, 1], history)
        figure.savefig(png_path, dpi=150, facecolor="white")


def draw_kl(axes: "Axes", history: RunHistory) -> None:
    """The KL on a logarithmic scale, that of full steps between short ones as points of their own,
    before a filled step curve of the prefix length."""
    lengths = axes.twinx()
    lengths.fill_between(
        history.step, history.prefix_length, step="mid", color=LENGTH_COLOUR, alpha=0.35, lw=0
    )
    apart, longest = anchors(history).any(), history.prefix_length.max()
    lengths.set_ylim(0, (1.3 if apart else 1.08) * longest)  # the legend stands above
    lengths.set_ylabel("prefix length, tokens", color="#b8651b")
    lengths.spines["right"].set_visible(True)
    axes.set_zorder(lengths.get_zorder() + 1)
    axes.patch.set_visible(False)
    draw_mean_kl(
        axes, history, 1, line={"color": KL_COLOUR, "lw": 1.5, "label": "KL of the short steps"},
        points={
            "color": ANCHOR_COLOUR, "marker": "o",
            "label": f"KL of the steps of {longest} tokens",
        },
    )  # fmt: skip
    if apart:
        axes.legend(loc="upper right", fontsize=8.5)
    if np.any(history.kl > 0):
        axes.set_yscale("log")
    axes.set_ylabel("mean KL a token, nats", color=KL_COLOUR)
    step_axis(axes)
    axes.set_title("KL and prefix length")


def draw_accuracy(axes: "Axes", history: RunHistory) -> None:
    """Accuracy at every evaluation: bars for a before and an after, a line for more."""
    axes.set_title("Accuracy on the held-out set")
    if not history.evaluations:
        axes.axis("off")
        axes.text(0.5, 0.5, "this recipe evaluates nothing", ha="center", color=FAINT)
        return
    steps = np.array([evaluation.step for evaluation in history.evaluations])
    percent = 100 * np.array([evaluation.accuracy for evaluation in history.evaluations])
    if len(steps) > 2:
        x = steps.astype(float)
        axes.plot(x, percent, color=ACCURACY_COLOUR, lw=1.8, marker="o", ms=4)
        step_axis(axes)
    else:
        x = np.arange(len(steps), dtype=float)
        axes.bar(x, percent, width=0.5, color=[FAINT, ACCURACY_COLOUR][-len(steps) :])
        names = [f"after step {step}" if step else "before" for step in steps]
        axes.set_xticks(x, names)
        axes.set_xlim(-0.6, len(steps) - 0.4)
    for x_i, percent_i in {x[0]: percent[0], x[-1]: percent[-1]}.items():
        axes.annotate(
            f"{percent_i:.1f}%", (x_i, percent_i), (0, 7), textcoords="offset points",
            ha="center", fontweight="bold", bbox={"fc": "white", "ec": "none", "pad": 1},
        )  # fmt: skip
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel(f"% of {history.evaluations[-1].n} prompts")


def draw_flops(axes: "Axes", history: RunHistory) -> None:
    """Cumulative FLOPs by part, under the full-length counterfactual of the same steps."""
    spent = history.flops.cumsum(axis=0)
    full = history.flops_full.cumsum()
    unit, name = unit_of(max(full[-1], spent[-1].sum()))
    axes.stackplot(history.step, spent.T / unit, labels=FLOPS_PARTS, colors=PART_COLOURS)
    axes.plot(history.step, full / unit, color=INK, lw=1.4, ls="--", label="full length")
    axes.set_ylim(0)
    axes.set_ylabel(f"{name}FLOP, cumulative")
    step_axis(axes)
    share = f": {spent[-1].sum() / full[-1]:.2f}x of full length" if full[-1] else ""
    axes.set_title("Compute" + share)
    axes.legend(loc="upper left")


def draw_heat_map(figure: "Figure", axes: "Axes", history: RunHistory) -> None:
    """KL by step (right) and prefix position (up); unreached positions stay light grey."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    grid_SL = stack_rows(history.kl_by_position)
    top = grid_SL.shape[1]
    grid_LS = shrink(shrink(grid_SL, MAX_CELLS).T, MAX_CELLS)
    axes.set_facecolor(UNREACHED)
    image = axes.imshow(
        np.ma.masked_invalid(np.clip(grid_LS, KL_FLOOR, KL_CEILING)),
        cmap=colormaps["magma"], norm=LogNorm(KL_FLOOR, KL_CEILING), origin="lower",
        aspect="auto", interpolation="nearest",
        extent=(history.step[0] - 0.5, history.step[-1] + 0.5, 0, top),
    )  # fmt: skip
    figure.colorbar(image, ax=axes, label="KL, nats", pad=0.02).outline.set_visible(False)
    step_axis(axes)
    axes.set_ylabel("prefix position")
    axes.set_title("KL by position")


def step_axis(axes: "Axes") -> None:
    """Steps to the right: no tick stands between two of them."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def unit_of(value: float) -> tuple[float, str]:
    """The factor and the prefix in which ``value`` reads as 1 to 1000."""
    for factor, prefix in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G")):
        if abs(value) >= factor:
            return factor, prefix
    return 1e6, "M"
