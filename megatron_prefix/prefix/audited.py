"""``audited``: full-length probes say whether the prefix still points where the whole rollout does.

A relative of ADWIN (arXiv 2605.28396), whose delayed full-rollout probes audit the alignment of
prefix and full rollout. The rule and its numbers here are this project's, not that paper's.
"""

from collections.abc import Mapping

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.adaptive import grown, shrunk
from megatron_prefix.prefix.policy import PrefixObservation, ProbeObservation, State, require


class AuditedPolicy:
    """``factor`` times as long after a probe whose gradients agree less than ``low``, as short
    after one whose agree more than ``high``; in between, and between probes, as it is."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        s = self._settings = config.audited
        self._min, self._max, self._length = config.min_length, config.max_length, config.min_length
        at, cosine = "prefix.audited.", "a cosine, from -1 to 1"
        require(s.factor > 1.0, f"{at}factor={s.factor}", "above 1", 1.5)
        require(-1.0 <= s.low <= 1.0, f"{at}low={s.low}", cosine, 0.6)
        require(-1.0 <= s.high <= 1.0, f"{at}high={s.high}", cosine, 0.9)
        require(s.low < s.high, f"{at}low={s.low}", f"below {at}high={s.high}", "0.6 and 0.9")

    def length(self, step: int) -> int:
        return self._length

    def observe(self, observation: PrefixObservation) -> None:
        """Steps alone cannot tell: they see nothing beyond the prefix."""

    def observe_probe(self, observation: ProbeObservation) -> None:
        settings, length = self._settings, self._length
        if observation.prefix_length != length:  # a verdict on another length is none on this one
            return
        if observation.agreement < settings.low:
            self._length = grown(length, settings.factor, self._max)
        elif observation.agreement > settings.high:
            self._length = shrunk(length, settings.factor, self._min)

    def state_dict(self) -> State:
        return {"length": self._length}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._length = int(state["length"])
