"""``cosine``: grow along half a cosine, the curve of SGDR's learning rate (arXiv 1608.03983, eq. 5)
turned upwards: slow while the student is new, slow again near the full length."""

import math

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.policy import ScheduledPolicy, share_of_steps


class CosinePolicy(ScheduledPolicy):
    """``min_length`` at step 0, ``max_length`` from step ``cosine.over * total_steps`` on."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        self._first = config.min_length
        self._span = config.max_length - config.min_length
        self._ramp = share_of_steps("prefix.cosine.over", config.cosine.over) * total_steps

    def length(self, step: int) -> int:
        done = 1.0 if step >= self._ramp else step / self._ramp
        return self._first + round(self._span * (1.0 - math.cos(math.pi * done)) / 2.0)
