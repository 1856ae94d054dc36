"""Where rollouts come from: SGLang servers asked with the prompt stream, or a recording."""

import math
from pathlib import Path
from typing import Any

from megatron_prefix.config import Recipe
from megatron_prefix.prompts import PromptStream
from megatron_prefix.rollout.collector import Collector
from megatron_prefix.rollout.records import load_rollouts, save_rollouts
from megatron_prefix.types import Rollout


class ServerSource:
    """Fresh rollouts from the servers, recorded where ``record_folder`` is given."""

    def __init__(
        self,
        recipe: Recipe,
        prompts: PromptStream,
        collector: Collector,
        record_folder: Path | None,
    ) -> None:
        self._prompts, self._collector, self._record = prompts, collector, record_folder
        rollout, self._wanted = recipe.rollout, recipe.train.global_batch_size
        # Over-sampled requests beyond the wanted ones are aborted as stragglers.
        started = self._wanted * max(rollout.over_sample, 1.0)
        self._prompts_a_step = math.ceil(started / rollout.samples_per_prompt)

    def sample(self, step: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        collected = self._collector.collect(
            self._prompts.take(self._prompts_a_step),
            max_new_tokens=prefix_length,
            policy_version=policy_version,
            wanted=self._wanted,
        )
        if self._record is not None:
            save_rollouts(self._record, step, collected.rollouts)
        return collected.rollouts

    def state_dict(self) -> dict[str, Any]:
        return self._prompts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._prompts.load_state_dict(state)


class ReplaySource:
    """The rollouts of a recorded run, by step; asks no server."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def sample(self, step: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        return list(load_rollouts(self._folder, step))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the step alone names the file."""
