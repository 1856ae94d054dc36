"""Pictures for a page and for a file: one drawing, as SVG that follows the page's colours and as
PNG in the light ones.

The SVG's text stays text: it takes the page's fonts and can be found and read aloud.
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prefix.report.markup import Html, element, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Each colour is drawn as it is in a PNG, and becomes the page's variable of this name in an SVG.
INK, MUTED, GRID, VOID = "#1d2b36", "#5f6f7c", "#dde3e8", "#e6eaed"
# Okabe and Ito's colours, which a colour-blind reader tells apart; yellow darkened for white paper.
RUN_COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#a8479c",
    "#8a6d00",
    "#2f9fd0",
    "#7a4a1e",
    "#55606a",
)
PART_COLOURS = {
    "rollout": "#e69f01",
    "teacher": "#56b4e8",
    "student": "#0072b1",
    "probes": "#cc79a6",
    "evaluation": "#009e72",
    "optimizer": "#d55e01",
    "sync": "#c9b700",
    "other": "#9aa5ae",
}
_SPARE = ("#7b68b5", "#8c6b4f", "#4f8c86")  # phases that a later version may add
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", "-", "--", "-.", ":")
_NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", VOID: "void"}
_NAMES |= {colour: f"run-{i}" for i, colour in enumerate(RUN_COLOURS)}
_NAMES |= {colour: f"part-{name}" for name, colour in PART_COLOURS.items()}

STYLE: dict[str, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Picture:
    """A drawing. ``name`` is the stem of its PNG, and unique on its page."""

    name: str
    svg: str
    png: bytes
    words: str  # what it shows, for those who cannot see it
    caption: str

    def html(self) -> Html:
        figure = Html(
            self.svg.replace("<svg ", f'<svg role="img" aria-label="{text(self.words)}" ', 1)
        )
        return element("figure", figure, element("figcaption", self.caption), id=self.name)

    def save(self, folder: Path) -> Path:
        path = folder / f"{self.name}.png"
        path.write_bytes(self.png)
        return path


def draw(
    name: str,
    paint: "Callable[[Figure], None]",
    size: tuple[float, float],
    *,
    words: str,
    caption: str,
) -> Picture:
    """Paints a figure of ``size`` (inches) and keeps it in both forms."""
    import matplotlib
    from matplotlib.figure import Figure

    # Figure itself, not pyplot: no window system and no state of the process is touched. The salt
    # makes an SVG's names its own among several on a page, and the same each time.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size)
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08, wspace=0.06)
        paint(figure)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=150, facecolor="white")
        figure.savefig(svg, format="svg", facecolor="none", metadata=_NO_METADATA)
    return Picture(name, _of_the_page(svg.getvalue(), name), png.getvalue(), words, caption)


_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def _of_the_page(svg: str, name: str) -> str:
    """Without its prologue, with ids of its own and with the page's colours."""
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', svg)
    for colour, variable in _NAMES.items():
        svg = svg.replace(f": {colour}", f": var(--{variable})")
    return svg


def part_colour(part: str, number: int = 0) -> str:
    return PART_COLOURS.get(part) or _SPARE[number % len(_SPARE)]


def run_style(index: int) -> dict[str, Any]:
    """Colour, line and marker of a report's run: told apart without colour as well."""
    i = index % len(RUN_COLOURS)
    return {"color": RUN_COLOURS[i], "ls": LINES[i], "marker": MARKERS[i]}


def shown_label(label: str, limit: int = 40) -> str:
    """``label`` for a legend: matplotlib leaves out those that begin with an underscore."""
    short = label if len(label) <= limit else f"{label[: limit - 1]}\u2026"
    return f"\u2009{short}" if short.startswith("_") else short


def plain_log_ticks(axes: "Axes", low: float, high: float) -> None:
    """A logarithmic y axis, labelled with 0.1 and not with a power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.set_ylim(low, high)
    narrow = high / low < 30
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend_beside_title(axes: "Axes") -> None:
    """On the title's line, to the right, so that it hides no data."""
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        loc="lower right", bbox_to_anchor=(1.02, 0.985), ncols=len(handles), handlelength=1.2,
        columnspacing=1.0, handletextpad=0.5, fontsize=8.5,
    )  # fmt: skip


def legend_below(axes: "Axes") -> None:
    """In a line under the axis' label, where the title leaves no room beside it."""
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=len(handles), handlelength=1.2,
        columnspacing=1.0, handletextpad=0.5, fontsize=8.5,
    )  # fmt: skip


def say(axes: "Axes", words: str) -> None:
    """Words in the place of a drawing that has nothing to show."""
    axes.axis("off")
    axes.text(0.5, 0.5, words, ha="center", va="center", color=MUTED, transform=axes.transAxes)
