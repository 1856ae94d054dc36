"""``steps``: grow in stages of one length each, a progressive horizon (arXiv 2605.31490)."""

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.policy import ScheduledPolicy, share_of_steps


class StepsPolicy(ScheduledPolicy):
    """``steps.stages`` lengths from ``min_length`` to ``max_length``, evenly apart; the last one
    from step ``steps.over * total_steps`` on, the others for equal parts of the time before it."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        self._last = config.steps.stages - 1
        if self._last < 1:
            raise ValueError(
                f"prefix.steps.stages={config.steps.stages} must be at least 2 lengths; try 4"
            )
        self._first = config.min_length
        self._span = config.max_length - config.min_length
        self._ramp = share_of_steps("prefix.steps.over", config.steps.over) * total_steps

    def length(self, step: int) -> int:
        stage = self._last if step >= self._ramp else int(self._last * step / self._ramp)
        return self._first + self._span * stage // self._last
