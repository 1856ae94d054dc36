"""The mean KL by step, for every picture that has it: long steps between short ones stand apart.

Legend: S steps.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_prefix.run_files.history import RunHistory

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ANCHOR_WORDS = "longest steps, between shorter ones"


def anchors(history: RunHistory) -> np.ndarray:
    """[S] bool: the steps of the longest prefix whose neighbours are shorter, as ``anchored`` takes
    them; none where a prefix only grew. Their mean is over positions that the other steps never
    see: one line through both would plunge at each and say nothing of the student."""
    lengths = history.prefix_length
    none = np.zeros(len(lengths), dtype=bool)
    if len(lengths) < 3:
        return none
    beside = np.pad(lengths, 1, mode="reflect")  # an end's missing neighbour is as its other one
    longest = lengths.max()
    peaks = (lengths == longest) & (beside[:-2] < longest) & (beside[2:] < longest)
    return peaks if peaks[1:-1].any() else none  # the end of a growing prefix is no peak


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Means over ``width`` neighbours, fewer at the ends; NaN left out."""
    kernel, known = np.ones(width), np.isfinite(values)
    total = np.convolve(np.where(known, values, 0.0), kernel, "same")
    count = np.convolve(known.astype(float), kernel, "same")
    return np.where(count > 0.5, total / np.maximum(count, 1), np.nan)


def one_width(histories: Sequence[RunHistory]) -> int:
    """Steps to smooth over, the same for all runs: of unlike windows the shorter run would look the
    noisier one."""
    return max(min(len(history.step) for history in histories) // 50, 1)


def draw_mean_kl(
    axes: "Axes",
    history: RunHistory,
    width: int,
    *,
    line: dict[str, Any],
    points: dict[str, Any],
) -> np.ndarray:
    """A line through the steps that are no anchors, smoothed over ``width`` of them, and a point
    for each anchor; what was drawn, [S]."""
    apart = anchors(history)
    kl = history.kl.copy()
    kl[~apart] = smooth(history.kl[~apart], width)
    axes.plot(history.step[~apart], kl[~apart], **line)
    if apart.any():
        axes.plot(history.step[apart], kl[apart], **{"ls": "", "ms": 3.5, **points})
    return kl
