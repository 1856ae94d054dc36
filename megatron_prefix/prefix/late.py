"""``late``: short prefixes first, full length for the rest of the run."""

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.policy import ScheduledPolicy, share_of_steps


class LatePolicy(ScheduledPolicy):
    """``min_length`` before step ``late.full_after * total_steps``, ``max_length`` from it on."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        share = share_of_steps("prefix.late.full_after", config.late.full_after)
        self._short, self._full = config.min_length, config.max_length
        self._full_from = share * total_steps

    def length(self, step: int) -> int:
        return self._full if step >= self._full_from else self._short
