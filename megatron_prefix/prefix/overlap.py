"""``overlap``: the prefix ends where student and teacher no longer expect the same tokens.

Prune-OPD (arXiv 2605.07804) watches the overlap of the two models' top-k tokens along a rollout:
where it falls, the rollout has drifted from what the teacher can correct. It weighs what follows
down and lets the length of later rollouts follow the length that was reliable. That second half is
done here, on the mean over a step's rollouts; the numbers are this project's.
"""

import math
from collections.abc import Mapping

import numpy as np

from megatron_prefix.config import OverlapConfig, PrefixConfig
from megatron_prefix.prefix.adaptive import grown
from megatron_prefix.prefix.policy import PrefixObservation, State, require


class OverlapPolicy:
    """``factor`` times as long after a step that was reliable to its end; after any other, part of
    the way down to the reliable length."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        s = self._settings = config.overlap
        self._min, self._max, self._length = config.min_length, config.max_length, config.min_length
        at, share = "prefix.overlap.", s.threshold
        require(s.factor > 1.0, f"{at}factor={s.factor}", "above 1", 1.5)
        require(0.0 < share < 1.0, f"{at}threshold={share}", "a share between 0 and 1", 0.5)
        require(s.window >= 1, f"{at}window={s.window}", "at least 1 token", 16)
        require(0.0 <= s.momentum < 1.0, f"{at}momentum={s.momentum}", "from 0 to below 1", 0.5)

    def length(self, step: int) -> int:
        return self._length

    def observe(self, observation: PrefixObservation) -> None:
        shares, tokens = observation.overlap_by_position, observation.tokens_by_position
        if observation.prefix_length != self._length or not len(shares):
            return  # a recording's step, or one without a teacher
        length = self._length
        reliable = reliable_length(shares, tokens, self._settings)
        if reliable >= length:
            self._length = grown(length, self._settings.factor, self._max)
        else:
            kept = self._settings.momentum
            self._length = max(self._min, math.ceil(kept * length + (1.0 - kept) * reliable))

    def state_dict(self) -> State:
        return {"length": self._length}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._length = int(state["length"])


def reliable_length(shares: np.ndarray, tokens: np.ndarray, config: OverlapConfig) -> int:
    """Positions before the first ``window`` of them whose mean overlap is under the threshold; all
    where there is none. ``shares`` float64 [L], NaN without a token, ``tokens`` int64 [L]."""
    sums = np.where(tokens > 0, np.nan_to_num(shares) * tokens, 0.0)
    window = min(config.window, len(shares))
    ones = np.ones(window)
    total, count = np.convolve(sums, ones, "valid"), np.convolve(tokens, ones, "valid")
    means = np.where(count > 0, total / np.maximum(count, 1), 1.0)
    drifted = np.flatnonzero(means < config.threshold)
    return int(drifted[0]) if len(drifted) else len(shares)
