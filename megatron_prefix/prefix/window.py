"""``window``: the loss on positions a to b alone, an ablation of where the signal lies."""

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.policy import ScheduledPolicy


class WindowPolicy(ScheduledPolicy):
    """Samples ``window.stop`` tokens and trains on those from position ``window.start`` on."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        self._start = config.window.start
        self._stop = config.window.stop or config.max_length
        if not 0 <= self._start < self._stop <= config.max_length:
            raise ValueError(
                f"prefix.window.start={self._start} to prefix.window.stop={self._stop} must hold a "
                f"position and end by prefix.max_length={config.max_length}; try prefix.window."
                f"start=0 prefix.window.stop={config.max_length}"
            )

    def length(self, step: int) -> int:
        return self._stop

    def loss_start(self, step: int) -> int:
        return self._start
