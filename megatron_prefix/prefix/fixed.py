"""``fixed``: one length for the whole run, the paper's own setting (arXiv 2602.15260)."""

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.policy import ScheduledPolicy


class FixedPolicy(ScheduledPolicy):
    """Always ``min_length``. With ``min_length == max_length`` it is full-length distillation."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        self._length = config.min_length

    def length(self, step: int) -> int:
        return self._length
