"""``adaptive``: longer once the student has learnt its prefix, the outlook of arXiv 2602.15260; and
an answer to probes whose tail has become worse."""

import math
from collections.abc import Mapping

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.policy import PrefixObservation, ProbeObservation, State, require

ON_TAIL = ("shrink", "grow", "hold")


class AdaptivePolicy:
    """Starts at ``min_length``. The moving average, and the lowest tail KL that probes have shown,
    begin anew at each length: beyond another length lies another tail."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        s = self._settings = config.adaptive
        self._min, self._max = config.min_length, config.max_length
        self._length, self._average, self._lowest_tail = config.min_length, math.nan, math.inf
        at, answers = "prefix.adaptive.", f"one of {', '.join(ON_TAIL)}"
        require(s.factor > 1.0, f"{at}factor={s.factor}", "above 1", 1.5)
        require(s.threshold > 0.0, f"{at}threshold={s.threshold}", "above 0 nats", 0.3)
        require(0.0 <= s.momentum < 1.0, f"{at}momentum={s.momentum}", "from 0 to below 1", 0.9)
        require(s.on_tail in ON_TAIL, f"{at}on_tail={s.on_tail!r}", answers, "shrink")
        tolerance = s.tail_tolerance
        require(tolerance >= 0.0, f"{at}tail_tolerance={tolerance}", "at least 0", 0.25)

    def length(self, step: int) -> int:
        return self._length

    def observe(self, observation: PrefixObservation) -> None:
        kl, keep = observation.mean_kl, self._settings.momentum
        if math.isfinite(kl):  # a step without a KL says nothing about the student
            old = kl if math.isnan(self._average) else self._average
            self._average = keep * old + (1.0 - keep) * kl
        if self._average < self._settings.threshold:
            self._move(longer=True)

    def observe_probe(self, observation: ProbeObservation) -> None:
        tail, settings = observation.kl_tail, self._settings
        if not math.isfinite(tail) or observation.prefix_length != self._length:
            return
        if tail > (1.0 + settings.tail_tolerance) * self._lowest_tail and (
            settings.on_tail != "hold"
        ):
            self._move(longer=settings.on_tail == "grow")
        else:
            self._lowest_tail = min(self._lowest_tail, tail)

    def _move(self, *, longer: bool) -> None:
        length = grown(self._length, self._settings.factor, self._max)
        if not longer:
            length = shrunk(self._length, self._settings.factor, self._min)
        if length != self._length:
            self._length, self._average, self._lowest_tail = length, math.nan, math.inf

    def state_dict(self) -> State:
        moving = {"average": self._average, "lowest_tail": self._lowest_tail}
        known = {name: value for name, value in moving.items() if math.isfinite(value)}
        return {"length": self._length, **known}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._length = int(state["length"])
        self._average = state.get("average", math.nan)
        self._lowest_tail = state.get("lowest_tail", math.inf)


def grown(length: int, factor: float, most: int) -> int:
    return min(most, math.ceil(length * factor))


def shrunk(length: int, factor: float, least: int) -> int:
    return max(least, math.floor(length / factor))
