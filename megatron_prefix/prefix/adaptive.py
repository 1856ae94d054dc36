"""``adaptive``: longer once the student has learnt its prefix, the outlook of arXiv 2602.15260."""

import math
from collections.abc import Mapping

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.policy import PrefixObservation, State


class AdaptivePolicy:
    """Starts at ``min_length``, never shrinks; the moving average begins anew at each length."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        s = self._settings = config.adaptive
        self._max, self._length, self._average = config.max_length, config.min_length, math.nan
        if not (s.factor > 1.0 and s.threshold > 0.0 and 0.0 <= s.momentum < 1.0):
            raise ValueError(f"prefix.adaptive: {s}; try factor 1.5, threshold 0.3, momentum 0.9")

    def length(self, step: int) -> int:
        return self._length

    def observe(self, observation: PrefixObservation) -> None:
        kl, keep = observation.mean_kl, self._settings.momentum
        if math.isfinite(kl):  # a step without a KL says nothing about the student
            old = kl if math.isnan(self._average) else self._average
            self._average = keep * old + (1.0 - keep) * kl
        if self._average < self._settings.threshold and self._length < self._max:
            self._length = min(self._max, math.ceil(self._length * self._settings.factor))
            self._average = math.nan

    def state_dict(self) -> State:
        average = {} if math.isnan(self._average) else {"average": self._average}
        return {"length": self._length, **average}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._length, self._average = (
            int(state["length"]),
            state.get("average", math.nan),
        )
