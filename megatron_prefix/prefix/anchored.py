"""``anchored``: short prefixes with a full-length step now and then, which holds the tail of a
small student that short prefixes alone would let go."""

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.policy import ScheduledPolicy


class AnchoredPolicy(ScheduledPolicy):
    """``min_length``, and ``max_length`` at the last of every ``anchored.every`` steps."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        if config.anchored.every < 1:
            raise ValueError(
                f"prefix.anchored.every={config.anchored.every} must be at least 1 step; try 8"
            )
        self._short, self._full = config.min_length, config.max_length
        self._every = config.anchored.every

    def length(self, step: int) -> int:
        return self._full if step % self._every == self._every - 1 else self._short
