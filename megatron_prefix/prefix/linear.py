"""``linear``: grow evenly with the steps, a progressive horizon (as in arXiv 2605.31490)."""

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.policy import ScheduledPolicy, share_of_steps


class LinearPolicy(ScheduledPolicy):
    """``min_length`` at step 0, ``max_length`` from step ``linear.over * total_steps`` on."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        self._first = config.min_length
        self._span = config.max_length - config.min_length
        self._ramp = share_of_steps("prefix.linear.over", config.linear.over) * total_steps

    def length(self, step: int) -> int:
        grown = 1.0 if step >= self._ramp else step / self._ramp
        return self._first + int(self._span * grown)
