"""``marginal``: each prefix stops where one token more would bring less KL than it costs.

Audited by full-length training steps, like the adaptive window of arXiv 2605.28396; the rule is
ours. With ``m(i)`` the KL that position ``i`` of an audit showed and ``P`` the prompt's tokens,
which every prefix pays for again, the length is ``argmax_L sum_{i<L} m(i) / (P + L)``: the most KL
a computed token. KL that lies early gives a short prefix; KL spread evenly, a full one. Audits
are averaged as logarithms: once little KL is left, one noisy audit may answer anything.
"""

import math
from collections.abc import Mapping

import numpy as np

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.policy import PrefixObservation, State


class MarginalPolicy:
    """``max_length`` at the first of every ``audit_every`` steps, what the audits say between."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        s = self._settings = config.marginal
        self._min, self._max = config.min_length, config.max_length
        self._log_length = math.nan  # natural logarithm of tokens; NaN before the first audit
        if not (s.audit_every >= 1 and 0.0 <= s.momentum < 1.0):
            raise ValueError(f"prefix.marginal: {s}; try audit_every 12, momentum 0.7")

    def length(self, step: int) -> int:
        if step % self._settings.audit_every == 0 or math.isnan(self._log_length):
            return self._max
        return min(max(round(math.exp(self._log_length)), self._min), self._max)

    def observe(self, observation: PrefixObservation) -> None:
        if observation.step % self._settings.audit_every or not math.isfinite(observation.mean_kl):
            return
        best = math.log(min(max(richest_length(observation), self._min), self._max))
        old = best if math.isnan(self._log_length) else self._log_length
        keep = self._settings.momentum
        self._log_length = keep * old + (1.0 - keep) * best

    def state_dict(self) -> State:
        return {} if math.isnan(self._log_length) else {"log_length": self._log_length}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._log_length = state.get("log_length", math.nan)


def richest_length(observation: PrefixObservation) -> int:
    """The prefix length, from 1, with the most KL a computed token; the shortest of equals.

    Rollouts that had ended before a position add nothing to its KL.
    """
    kl, reached = observation.kl_by_position, observation.tokens_by_position
    mass = np.where(reached > 0, np.nan_to_num(kl) * reached, 0.0).cumsum()
    tokens = observation.prompt_length + np.arange(1, len(mass) + 1)
    return int(np.argmax(mass / tokens)) + 1
