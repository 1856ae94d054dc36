"""Where rollouts come from: servers asked with the prompt stream, written answers, a recording."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_prefix.config import Recipe
from megatron_prefix.data.prompts import PromptStream
from megatron_prefix.modes import written_count
from megatron_prefix.prefix.recall import Recall
from megatron_prefix.rollout.collector import Collector
from megatron_prefix.rollout.discarded import Discarded
from megatron_prefix.rollout.records import load_record, save_rollouts
from megatron_prefix.types import Rollout


class RolloutSource(Protocol):
    """Where a step's rollouts come from."""

    def sample(self, step: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        """The rollouts of step ``step`` (from 0)."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Supply(Protocol):
    """Gives rollouts for a batch or for a part of it."""

    def take(self, count: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        """``count`` rollouts of at most ``prefix_length`` tokens."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ServerSource:
    """Fresh rollouts from the servers."""

    def __init__(
        self,
        recipe: Recipe,
        prompts: PromptStream,
        collector: Collector,
        recall: Recall | None = None,
    ) -> None:
        self._prompts, self._collector, self._rollout = prompts, collector, recipe.rollout
        self._recall = recall

    def take(self, count: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        # Over-sampled requests beyond the wanted ones are aborted as stragglers.
        started = count * max(self._rollout.over_sample, 1.0)
        prompts = math.ceil(started / self._rollout.samples_per_prompt)
        return self._collector.collect(
            self._prompts.take(prompts),
            max_new_tokens=prefix_length,
            policy_version=policy_version,
            wanted=count,
            cap=self._recall.cap if self._recall else None,
        )

    def state_dict(self) -> dict[str, Any]:
        return self._prompts.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._prompts.load_state_dict(state)


class ModeSource:
    """Each step's batch as the recipe's mode wants it: sampled rollouts first, then written ones.

    ``supplies``: ``sampled`` and ``written``, as many of the two as the run will take from.
    """

    def __init__(self, recipe: Recipe, supplies: Mapping[str, Supply]) -> None:
        self._recipe, self._supplies = recipe, dict(supplies)

    def sample(self, step: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        written = written_count(self._recipe, step)
        counts = {"sampled": self._recipe.train.global_batch_size - written, "written": written}
        return [
            rollout
            for name, count in counts.items()
            if count
            for rollout in self._supplies[name].take(count, prefix_length, policy_version)
        ]

    def state_dict(self) -> dict[str, Any]:
        return {name: supply.state_dict() for name, supply in self._supplies.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, supply in self._supplies.items():
            supply.load_state_dict(state[name])


class RecordedSource:
    """Another source, with every step's rollouts kept in ``folder``, and what was thrown away for
    them: in this call, and in those before it whose rollouts held nothing to train on."""

    def __init__(self, source: RolloutSource, folder: Path, discarded: Discarded) -> None:
        self._source, self._folder, self._discarded = source, folder, discarded

    def sample(self, step: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        rollouts = self._source.sample(step, prefix_length, policy_version)
        save_rollouts(self._folder, step, rollouts, self._discarded.seen())
        return rollouts

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state)


class ReplaySource:
    """The rollouts of a recorded run, by step; asks no server. ``discarded`` is told of what the
    recorded run had thrown away, which the ledger counts again."""

    def __init__(self, folder: Path, discarded: Discarded) -> None:
        self._folder, self._discarded = folder, discarded

    def sample(self, step: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        rollouts, discarded = load_record(self._folder, step)
        self._discarded.add(discarded)
        return rollouts

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: the step alone names the file."""
