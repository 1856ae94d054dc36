"""What a prefix policy is. One small file a policy lies beside this one.

A policy's class is built as ``Class(config: PrefixConfig, total_steps: int)``. Steps count from 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

State = dict[str, float]  # what a checkpoint keeps of a policy: JSON numbers


@dataclass(frozen=True)
class PrefixObservation:
    """What a finished step showed, the same on every rank."""

    step: int  # from 0
    prefix_length: int  # tokens, what ``length(step)`` had answered
    loss_start: int  # the first position that the loss counted; 0 but for windows
    mean_kl: float  # nats a token over the tokens in the loss; NaN where there was none
    kl_by_position: np.ndarray  # float64 [prefix_length], mean; NaN where no rollout reached,
    # and before loss_start
    tokens_by_position: np.ndarray  # int64 [prefix_length], rollouts that reached it, in the loss
    prompt_length: float  # mean tokens of the rollouts' prompts
    # float64 [prefix_length], mean share of prefix.overlap_k likeliest tokens that both models
    # have, NaN as kl_by_position is; [0] where none were compared
    overlap_by_position: np.ndarray = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class ProbeObservation:
    """What a probe showed with the weights after ``step`` finished steps."""

    step: int
    prefix_length: int  # ``length(step)`` before the probe
    kl_prefix: float  # nats a token, mean before prefix_length
    kl_tail: float  # mean from there on; NaN where no rollout went that far
    agreement: float  # cosine of prefix and full gradients, 1 where the prefix is all there is;
    # NaN where it was not measured
    kl_by_position: np.ndarray  # float64 [max_length]


@runtime_checkable
class PrefixPolicy(Protocol):
    """Answers how many tokens a step's rollouts may have.

    ``length`` changes nothing: it may be asked for any step, any number of times. Whatever moves
    with the data moves in ``observe`` and lies in the state.
    """

    def length(self, step: int) -> int: ...

    def observe(self, observation: PrefixObservation) -> None: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: Mapping[str, float]) -> None: ...


@runtime_checkable
class WindowedPolicy(PrefixPolicy, Protocol):
    """A policy that leaves the first positions of each rollout out of the loss."""

    def loss_start(self, step: int) -> int:
        """The first position, from 0, that the loss counts: below ``length(step)``."""


def loss_start(policy: PrefixPolicy, step: int) -> int:
    """Where the loss begins: 0 for a policy that says nothing of it."""
    return policy.loss_start(step) if isinstance(policy, WindowedPolicy) else 0


@runtime_checkable
class ProbedPolicy(PrefixPolicy, Protocol):
    """A policy that learns from probes too; checkpoints are written after them."""

    def observe_probe(self, observation: ProbeObservation) -> None: ...


def observe_probe(policy: PrefixPolicy, observation: ProbeObservation) -> None:
    """Tells a policy of a probe, where it wants to know."""
    if isinstance(policy, ProbedPolicy):
        policy.observe_probe(observation)


class ScheduledPolicy:
    """Base of policies whose length follows from the step alone: nothing to observe or to keep."""

    def observe(self, observation: PrefixObservation) -> None:
        pass

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        if state:
            raise ValueError(
                f"the checkpoint's prefix state {sorted(state)} is of another policy than "
                f"{type(self).__name__}, which has none; resume with the policy that wrote it"
            )


def share_of_steps(key: str, share: float) -> float:
    """``share`` itself; ValueError where it is none."""
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{key}={share} must be a share of the steps, from 0 to 1; try 0.8")
    return share


def require(holds: bool, setting: str, rule: str, good: object) -> None:
    """ValueError that says what ``setting``, with its value, must be, and one that is."""
    if not holds:
        raise ValueError(f"{setting} must be {rule}; try {good}")
