"""``recall``: a prompt that comes again gets as many tokens as it needed the last time. Pure.

The teacher's word comes after sampling, so it can only shorten the *next* visit: a cap for each
prompt, predicted from the per-token KL of its last rollouts. A cap that no longer holds, for the KL
has not settled within it, is forgotten, and the prompt gets the step's whole length again.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_prefix.config import RecallConfig
from megatron_prefix.types import Rollout


class Recall:
    """Caps by prompt. Prompts are known by a digest of their tokens, epochs and orders apart."""

    def __init__(self, config: RecallConfig) -> None:
        check(config)
        self._config, self._caps = config, dict[str, int]()

    def cap(self, prompt_ids: Sequence[int], prefix_length: int) -> int:
        """Tokens for the prompt's next rollouts: ``prefix_length`` for one not seen, or not
        settled."""
        return min(self._caps.get(_digest(prompt_ids), prefix_length), prefix_length)

    def observe(
        self, rollouts: Sequence[Rollout], kl: Sequence[np.ndarray], loss_start: int = 0
    ) -> None:
        """``kl``: of each rollout's tokens from ``loss_start`` on, fp32 [L_i - loss_start]."""
        needed: dict[str, list[float]] = {}
        for rollout, kl_L in zip(rollouts, kl, strict=True):
            tokens = settled(kl_L, self._config, loss_start)
            needed.setdefault(_digest(rollout.prompt_ids), []).append(tokens)
        for digest, samples in needed.items():  # as many as the neediest of its samples
            most = max(samples)
            if math.isfinite(most):
                self._caps[digest] = math.ceil(self._config.slack * most)
            else:
                self._caps.pop(digest, None)

    def state_dict(self) -> dict[str, int]:
        return dict(self._caps)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._caps = dict(state)


def settled(kl_L: np.ndarray, config: RecallConfig, loss_start: int = 0) -> float:
    """Tokens of the rollout up to the first full window whose mean KL is at most the threshold,
    ``min_tokens`` at least; infinite where there is none."""
    window = config.window
    if len(kl_L) < window:
        return math.inf
    sums = np.concatenate([[0.0], np.cumsum(kl_L, dtype=np.float64)])
    means = (sums[window:] - sums[:-window]) / window  # of the window that ends after i + window
    ends = loss_start + window + np.arange(len(means))
    found = ends[(means <= config.threshold) & (ends >= config.min_tokens)]
    return float(found[0]) if len(found) else math.inf


def check(config: RecallConfig) -> None:
    """ValueError for settings that cannot be."""
    for name in ("window", "min_tokens"):
        if getattr(config, name) < 1:
            value = getattr(config, name)
            raise ValueError(f"prefix.recall.{name}={value} must be at least 1 token")
    if not (0.0 <= config.threshold < math.inf and 1.0 <= config.slack < math.inf):
        raise ValueError(
            f"prefix.recall: threshold={config.threshold} must be at least 0 nats and slack="
            f"{config.slack} at least 1; try 0.05 and 1.25"
        )


def _digest(prompt_ids: Sequence[int]) -> str:
    data = np.asarray(prompt_ids, np.int64).tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
