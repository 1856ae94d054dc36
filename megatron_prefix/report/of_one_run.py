"""Pictures of one run: KL by position, probes, cumulative FLOPs, seconds by phase.

Legend: S steps or probes, L positions.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prefix.report import picture
from megatron_prefix.report.figure import MAX_CELLS, step_axis, unit_of
from megatron_prefix.report.picture import INK, VOID, Picture
from megatron_prefix.report.story import RunStory
from megatron_prefix.run_files.history import FLOPS_PARTS
from megatron_prefix.run_files.kl_grid import KL_CEILING, KL_FLOOR, shrink, stack_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = "viridis"  # even in lightness, and the same to a colour-blind eye
_ON_THE_MAP = "#111111"  # the map has its colours in light and in dark, and so has what is on it
_BINS = 120  # of the seconds' stack: more steps than that are taken together
_LINES_OF_PROBES = 3


def kl_picture(story: RunStory, number: int) -> Picture:
    """KL by step and position; beside it the probes', whose rollouts are of full length."""
    probed = bool(story.probes)

    def paint(figure: "Figure") -> None:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm

        every = figure.subplots(1, 2 if probed else 1, squeeze=False)[0]
        history = story.history
        grid_SL = stack_rows(history.kl_by_position)
        _heat_map(every[0], grid_SL, history.step)
        every[0].set_title("KL by position, training")
        every[0].set_ylabel("position in the rollout")
        if probed:
            steps = np.array([probe["step"] for probe in story.probes])
            rows = [np.array(probe["kl_by_position"], dtype=float) for probe in story.probes]
            _heat_map(every[1], stack_rows(rows), steps)
            every[1].set_title("KL by position, probes of full length")
            lengths = [probe["prefix_length"] for probe in story.probes]
            style = {"color": "white", "lw": 2.6, "drawstyle": "steps-post"}
            every[1].plot(steps, lengths, **style)
            every[1].plot(steps, lengths, color=_ON_THE_MAP, lw=1.1, drawstyle="steps-post")
            every[1].annotate(
                "prefix length", (steps[0], lengths[0]), (4, 5), textcoords="offset points",
                fontsize=9, color=_ON_THE_MAP, bbox={"fc": "white", "ec": "none", "pad": 1.5},
            )  # fmt: skip
        norm = LogNorm(KL_FLOOR, KL_CEILING)
        bar = figure.colorbar(
            ScalarMappable(norm, _COLOURS), ax=list(every), pad=0.015, label="KL, nats"
        )
        bar.ax.set_yticks(
            [1e-4, 1e-3, 1e-2, 0.1, 1, 10], ["0.0001", "0.001", "0.01", "0.1", "1", "10"]
        )
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)

    return picture.draw(
        f"kl-{number}",
        paint,
        (11, 3.9),
        words=f"heat map of {story.label}'s KL by step and position",
        caption="Grey: no rollout went that far."
        + (" Right: nobody is trained on these rollouts; what lies above the line is the tail."
           if probed else ""),
    )  # fmt: skip


def _heat_map(axes: "Axes", grid_SL: np.ndarray, steps: np.ndarray) -> None:
    """Steps to the right, positions up."""
    from matplotlib.colors import LogNorm

    edges = _edges(steps) if len(steps) <= MAX_CELLS else None
    cells_LS = shrink(shrink(grid_SL, MAX_CELLS).T, MAX_CELLS)
    held = np.ma.masked_invalid(np.clip(cells_LS, KL_FLOOR, KL_CEILING))
    axes.set_facecolor(VOID)
    axes.grid(visible=False)
    if edges is None:
        edges = np.linspace(steps[0] - 0.5, steps[-1] + 0.5, held.shape[1] + 1)
    heights = np.linspace(0, grid_SL.shape[1], held.shape[0] + 1)
    axes.pcolormesh(
        edges, heights, held, norm=LogNorm(KL_FLOOR, KL_CEILING), cmap=_COLOURS, rasterized=True
    )
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, grid_SL.shape[1])
    step_axis(axes)


def _edges(steps: np.ndarray) -> np.ndarray:
    """[S + 1]: each step's column goes on to the next one's."""
    last = steps[-1] - steps[-2] if len(steps) > 1 else 1
    return np.concatenate([steps, [steps[-1] + last]]).astype(float)


def probes_picture(story: RunStory, number: int) -> Picture:
    """What the probes saw: within the prefix and beyond it, by step and by position."""

    def paint(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2)
        steps = [probe["step"] for probe in story.probes]
        for key, name, index in (
            ("kl_prefix", "within the prefix", 0),
            ("kl_tail", "beyond it", 1),
        ):
            values = [_real(probe.get(key)) for probe in story.probes]
            left.plot(steps, values, label=name, lw=1.8, ms=5, **picture.run_style(index))
        _log_scale(left, [p.get(k) for p in story.probes for k in ("kl_prefix", "kl_tail")])
        step_axis(left)
        left.set_ylabel("mean KL, nats a token")
        left.set_title("Probes")
        _draw_agreement(left, story.probes)
        picture.legend_beside_title(left)
        _draw_positions(right, _spread(story.probes))

    return picture.draw(
        f"probes-{number}",
        paint,
        (11, 3.9),
        words=f"the KL of {story.label}'s probes within the prefix and beyond it",
        caption="A tail whose KL rises while the prefix's falls is being lost: lengthen the prefix,"
        " or take full-length steps now and then (prefix.policy=anchored). Gradients: cosine of the"
        " prefix's with the full rollouts'.",
    )


def _draw_agreement(axes: "Axes", probes: Sequence[Mapping[str, Any]]) -> None:
    """The cosine of prefix and full gradients on an axis of its own, where it was measured."""
    values = [_real(probe.get("agreement")) for probe in probes]
    if not np.isfinite(values).any():
        return
    style = picture.run_style(2)
    cosine = axes.twinx()
    cosine.plot([probe["step"] for probe in probes], values, lw=1.4, ms=5, **style)
    cosine.set_ylim(min(0.0, float(np.nanmin(values))) - 0.05, 1.05)
    cosine.set_ylabel("cosine of gradients")
    cosine.spines["right"].set_visible(True)
    cosine.grid(visible=False)
    axes.plot([], [], label="gradients", **style)  # for the legend of the other axis


def _draw_positions(axes: "Axes", probes: Sequence[Mapping[str, Any]]) -> None:
    for index, probe in enumerate(probes):
        kl = np.array(probe["kl_by_position"], dtype=float)
        style = {**picture.run_style(index + 2), "marker": ""}
        axes.plot(np.arange(len(kl)), kl, lw=1.5, label=f"step {probe['step']}", **style)
    _log_scale(axes, [value for probe in probes for value in probe["kl_by_position"]])
    axes.set_xlabel("position in the rollout")
    axes.set_ylabel("mean KL, nats")
    axes.set_title("KL by position")
    picture.legend_beside_title(axes)


def _spread(probes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """First, middle and last."""
    at = np.linspace(0, len(probes) - 1, min(len(probes), _LINES_OF_PROBES)).round().astype(int)
    return [probes[i] for i in at]


def _log_scale(axes: "Axes", values: Sequence[float | None]) -> None:
    known = [value for value in values if value is not None and value > KL_FLOOR / 10]
    if known:
        picture.plain_log_ticks(axes, max(min(known), KL_FLOOR) / 1.4, max(known) * 1.4)


def _real(value: float | None) -> float:
    return float("nan") if value is None else value


def growth_picture(story: RunStory, number: int) -> Picture:
    """Cumulative FLOPs under the counterfactual, and a step's seconds by phase."""

    def paint(figure: "Figure") -> None:
        left, right = figure.subplots(1, 2)
        _draw_flops(left, story)
        _draw_seconds(right, story)

    return picture.draw(
        f"growth-{number}",
        paint,
        (11, 3.9),
        words=f"cumulative FLOPs of {story.label} by part, and seconds a step by phase",
        caption="Dashed: what the same steps would have cost with full-length rollouts."
        f"{_grouped(story)}",
    )


def _draw_flops(axes: "Axes", story: RunStory) -> None:
    history = story.history
    spent, full = history.flops.cumsum(axis=0), history.flops_full.cumsum()
    factor, prefix = unit_of(max(full[-1], spent[-1].sum()))
    colours = [picture.PART_COLOURS[part] for part in FLOPS_PARTS]
    steps, values = _from_zero(history.step, spent.T / factor)
    axes.stackplot(steps, values, labels=FLOPS_PARTS, colors=colours, lw=0)
    _, line = _from_zero(history.step, full[None] / factor)
    axes.plot(steps, line[0], color=INK, lw=1.5, ls="--", label="at full length")
    axes.set_ylim(0)
    axes.set_xlim(0, steps[-1])
    step_axis(axes)
    axes.set_ylabel(f"{prefix}FLOP, cumulative")
    axes.set_title("FLOPs")
    picture.legend_beside_title(axes)


def _from_zero(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The run's start added: nothing spent after step 0."""
    start = np.zeros((len(values), 1))
    return np.concatenate([[0], steps]), np.concatenate([start, values], axis=1)


def _draw_seconds(axes: "Axes", story: RunStory) -> None:
    history = story.history
    group = _group(story)
    steps = history.step[::group].astype(float)
    rows = [_means(values, group) for values in history.seconds.values()]
    colours = [picture.part_colour(phase, i) for i, phase in enumerate(history.seconds)]
    if len(steps) == 1:
        steps, rows = np.array([steps[0] - 0.5, steps[0] + 0.5]), [row.repeat(2) for row in rows]
    axes.stackplot(steps, rows, labels=list(history.seconds), colors=colours, lw=0)
    _limit_seconds(axes, np.sum(rows, axis=0))
    axes.set_xlim(steps[0], steps[-1])
    step_axis(axes)
    axes.set_ylabel("seconds")
    axes.set_title("Seconds a step, by phase")
    picture.legend_below(axes)


def _limit_seconds(axes: "Axes", total: np.ndarray) -> None:
    """One slow step must not flatten the others: what is cut off is told in words."""
    limit = 1.15 * float(np.quantile(total, 0.98))
    axes.set_ylim(0, limit)
    beyond = total[total > limit]
    if not len(beyond):
        return
    words = f"{len(beyond)} of {len(total)} cut off, up to {beyond.max():.3g} s"
    axes.text(
        0.99, 0.98, words, ha="right", va="top", transform=axes.transAxes, fontsize=8.5, color=INK,
        bbox={"fc": "white", "ec": "none", "pad": 1.5, "alpha": 0.8},
    )  # fmt: skip


def _group(story: RunStory) -> int:
    return -(-len(story.history.step) // _BINS)


def _grouped(story: RunStory) -> str:
    group = _group(story)
    return f" Seconds are means over {group} neighbouring steps." if group > 1 else ""


def _means(values: np.ndarray, group: int) -> np.ndarray:
    return np.array([np.mean(values[i : i + group]) for i in range(0, len(values), group)])
