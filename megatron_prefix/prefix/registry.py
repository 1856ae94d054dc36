"""From the recipe's ``prefix`` section to a policy."""

import difflib
from collections.abc import Callable, Mapping

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix.adaptive import AdaptivePolicy
from megatron_prefix.prefix.anchored import AnchoredPolicy
from megatron_prefix.prefix.audited import AuditedPolicy
from megatron_prefix.prefix.cosine import CosinePolicy
from megatron_prefix.prefix.fixed import FixedPolicy
from megatron_prefix.prefix.late import LatePolicy
from megatron_prefix.prefix.linear import LinearPolicy
from megatron_prefix.prefix.marginal import MarginalPolicy
from megatron_prefix.prefix.overlap import OverlapPolicy
from megatron_prefix.prefix.policy import (
    PrefixObservation,
    PrefixPolicy,
    ProbeObservation,
    ScheduledPolicy,
    State,
    loss_start,
    observe_probe,
)
from megatron_prefix.prefix.steps import StepsPolicy
from megatron_prefix.prefix.window import WindowPolicy
from megatron_prefix.users_code import call_users, import_by_path

PolicyClass = Callable[[PrefixConfig, int], PrefixPolicy]

POLICIES: Mapping[str, PolicyClass] = {
    "fixed": FixedPolicy,
    "linear": LinearPolicy,
    "steps": StepsPolicy,
    "cosine": CosinePolicy,
    "anchored": AnchoredPolicy,
    "late": LatePolicy,
    "adaptive": AdaptivePolicy,
    "marginal": MarginalPolicy,
    "audited": AuditedPolicy,
    "overlap": OverlapPolicy,
    "window": WindowPolicy,
}


class BoundedPolicy:
    """A user's policy, held to the bounds that packing, cache and context were planned for. What
    it raises is a ValueError that names it and the step."""

    def __init__(self, inner: PrefixPolicy, config: PrefixConfig) -> None:
        self.inner, self._config = inner, config
        self._setting = f"prefix.policy={config.policy}"

    def length(self, step: int) -> int:
        length = call_users(self._setting, f"length({step})", self.inner.length, step)
        if not (_is_whole(length) and 1 <= length <= self._config.max_length):
            raise ValueError(
                f"{self._setting} answered {length!r} for step {step}: it must "
                f"be a whole number from 1 to prefix.max_length={self._config.max_length}"
            )
        return length

    def loss_start(self, step: int) -> int:
        asked = f"loss_start({step})"
        start, length = (
            call_users(self._setting, asked, loss_start, self.inner, step),
            self.length(step),
        )
        if not (_is_whole(start) and 0 <= start < length):
            raise ValueError(
                f"{self._setting} starts the loss of step {step} at {start!r}: "
                f"it must be a whole number from 0 to below that step's length {length}"
            )
        return start

    def observe(self, observation: PrefixObservation) -> None:
        told = f"observe of step {observation.step}"
        call_users(self._setting, told, self.inner.observe, observation)

    def observe_probe(self, observation: ProbeObservation) -> None:
        told = f"observe_probe after {observation.step} steps"
        call_users(self._setting, told, observe_probe, self.inner, observation)

    def state_dict(self) -> State:
        return call_users(self._setting, "state_dict()", self.inner.state_dict)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        call_users(
            self._setting, f"load_state_dict({dict(state)})", self.inner.load_state_dict, state
        )


def is_scheduled(policy: PrefixPolicy) -> bool:
    """Whether its lengths follow from the step alone, a user's own policy's too."""
    inner = policy.inner if isinstance(policy, BoundedPolicy) else policy
    return isinstance(inner, ScheduledPolicy)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def build_policy(config: PrefixConfig, total_steps: int) -> PrefixPolicy:
    """The policy of a run of ``total_steps`` steps; ValueError for a name or setting that is no
    good."""
    if config.min_length < 1:
        raise ValueError(f"prefix.min_length={config.min_length} must be at least 1 token")
    if config.max_length < config.min_length:
        raise ValueError(
            f"prefix.max_length={config.max_length} is below "
            f"prefix.min_length={config.min_length}; set it to {config.min_length} or more"
        )
    if config.policy in POLICIES:
        return POLICIES[config.policy](config, total_steps)
    if ":" in config.policy:
        return BoundedPolicy(_users_policy(config, total_steps), config)
    near = difflib.get_close_matches(config.policy, POLICIES, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(POLICIES)}"
    raise ValueError(
        f"prefix.policy={config.policy!r} is unknown. {hint} "
        "(or name your own: package.module:Class)"
    )


def _users_policy(config: PrefixConfig, total_steps: int) -> PrefixPolicy:
    setting, options = f"prefix.policy={config.policy}", ", ".join(config.options) or "nothing"
    cls = import_by_path("prefix.policy", config.policy)
    try:
        policy = call_users(setting, "the class", cls, config, total_steps)
    except ValueError as error:
        if isinstance(error.__cause__, KeyError):  # most often of config.options
            raise ValueError(
                f"{setting} asks for {error.__cause__}, and prefix.options has {options}; set it, "
                "as prefix.options.period=5"
            ) from error
        raise
    if not isinstance(policy, PrefixPolicy):
        raise ValueError(
            f"prefix.policy={config.policy!r} lacks one of length, observe, state_dict, "
            "load_state_dict"
        )
    return policy
