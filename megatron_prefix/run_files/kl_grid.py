"""KL by step and prefix position as a grid, for the images of TensorBoard and of the report.

Legend: S steps, L prefix positions; NaN marks a position that no rollout of its step reached.
"""

from collections.abc import Sequence

import numpy as np

KL_FLOOR = 1e-4  # both pictures' logarithmic colour scales run from here
KL_CEILING = 10.0


def mean_kl(kl_by_position: np.ndarray, tokens_by_position: np.ndarray) -> float:
    """The token-weighted mean of one step's KL ([L] each); NaN without a token."""
    reached = tokens_by_position > 0
    count = int(tokens_by_position[reached].sum())
    if not count:
        return float("nan")
    return float((kl_by_position[reached] * tokens_by_position[reached]).sum() / count)


def stack_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """S arrays [L_s] as one float64 [S, max L_s] (at least one column), NaN past each one's end."""
    width = max((len(row) for row in rows), default=0)
    grid_SL = np.full((len(rows), max(width, 1)), np.nan)
    for target, row in zip(grid_SL, rows, strict=True):
        target[: len(row)] = row
    return grid_SL


def shrink(grid: np.ndarray, width: int) -> np.ndarray:
    """Means over groups of neighbouring columns, NaN left out, until at most ``width`` are left."""
    group = -(-grid.shape[1] // width)
    if group == 1:
        return grid
    padded = np.pad(grid, ((0, 0), (0, -grid.shape[1] % group)), constant_values=np.nan)
    cells = padded.reshape(grid.shape[0], -1, group)
    count = (~np.isnan(cells)).sum(axis=-1)
    return np.where(count > 0, np.nansum(cells, axis=-1) / np.maximum(count, 1), np.nan)
