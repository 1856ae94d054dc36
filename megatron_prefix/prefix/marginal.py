"""``marginal``: each prefix stops where one token more would bring less KL than it costs.

Audited by full-length training steps, like the adaptive window of arXiv 2605.28396; the rule is
ours. With ``m(i)`` the KL that position ``i`` of an audit showed and ``P`` the prompt's tokens,
which every prefix pays for again, the length is ``argmax_L sum_{i<L} m(i) / (P + L)``: the most KL
a computed token. KL that lies early gives a short prefix; KL spread evenly, a full one. The
shortest of the last audits' lengths counts: a student that stumbles for a few steps spreads its KL,
and the audits, which train, are what helps it up; a weakness that lasts is in all of them.
"""

import math
from collections import deque
from collections.abc import Mapping

import numpy as np

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.policy import PrefixObservation, State, require


class MarginalPolicy:
    """``max_length`` at the first of every ``audit_every`` steps, what the audits say between."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        s = self._settings = config.marginal
        at = "prefix.marginal."
        require(s.audit_every >= 1, f"{at}audit_every={s.audit_every}", "at least 1 step", 12)
        require(s.audits >= 1, f"{at}audits={s.audits}", "at least 1", 4)
        self._min, self._max = config.min_length, config.max_length
        self._lengths: deque[int] = deque(maxlen=s.audits)  # what each said, in tokens

    def length(self, step: int) -> int:
        if step % self._settings.audit_every == 0 or not self._lengths:
            return self._max
        return min(max(min(self._lengths), self._min), self._max)

    def observe(self, observation: PrefixObservation) -> None:
        if observation.step % self._settings.audit_every or not math.isfinite(observation.mean_kl):
            return
        self._lengths.append(richest_length(observation))

    def state_dict(self) -> State:
        return {f"audit_{age}": length for age, length in enumerate(reversed(self._lengths))}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._lengths.clear()
        self._lengths.extend(int(state[f"audit_{age}"]) for age in reversed(range(len(state))))


def richest_length(observation: PrefixObservation) -> int:
    """The prefix length, from 1, with the most KL a computed token; the shortest of equals.

    Rollouts that had ended before a position add nothing to its KL.
    """
    kl, reached = observation.kl_by_position, observation.tokens_by_position
    mass = np.where(reached > 0, np.nan_to_num(kl) * reached, 0.0).cumsum()
    tokens = observation.prompt_length + np.arange(1, len(mass) + 1)
    return int(np.argmax(mass / tokens)) + 1
