"""A user's own policy with a slip in it is named, with the step and the place."""

from dataclasses import replace
from functools import partial

import pytest

from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix import PrefixObservation, build_policy, loss_start
from tests.refused import refusal_of
from tests.unit.test_prefix_policies import HalfPolicy, observation


class FaultyPolicy(HalfPolicy):
    """A user's own with a slip in the method that options name, from a step on."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        super().__init__(config, total_steps)
        self._faults = config.options
        self._slip("__init__", 0)

    def _slip(self, method: str, step: int) -> None:
        1 / (step - self._faults.get(method, -1))

    def length(self, step: int) -> int:
        self._slip("length", step)
        return super().length(step)

    def loss_start(self, step: int) -> int:
        self._slip("loss_start", step)
        return 0

    def observe(self, observation: PrefixObservation) -> None:
        self._slip("observe", observation.step)

    def state_dict(self) -> dict[str, float]:
        self._slip("state_dict", 0)
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.seen = state["no_such"]


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("length", "length(3)"),
        ("loss_start", "loss_start(3)"),
        ("observe", "observe of step 3"),
    ],
)
def test_what_a_users_policy_raises_names_it_and_the_step(method: str, call: str) -> None:
    name = f"{__name__}:FaultyPolicy"
    policy = build_policy(PrefixConfig(name, 2, 30, options={method: 3}), 10)
    asks = {"length": policy.length, "loss_start": partial(loss_start, policy)}
    seen = {2: observation(2, 15, 0.1), 3: observation(3, 15, 0.1)}
    ask = asks.get(method, lambda step: policy.observe(seen[step]))
    ask(2)
    told = refusal_of(ask, 3)
    assert told.startswith(f"prefix.policy={name}: {call} raised ZeroDivisionError: division")
    assert "(test_users_code.py, line " in told


def test_a_users_policy_fails_by_name_where_it_is_built_and_kept() -> None:
    name = f"{__name__}:FaultyPolicy"
    config = PrefixConfig(name, 2, 30, options={"__init__": 0})
    assert f"{name}: the class raised ZeroDivisionError" in refusal_of(build_policy, config, 10)
    policy = build_policy(replace(config, options={"state_dict": 0}), 10)
    assert f"{name}: state_dict() raised ZeroDivisionError" in refusal_of(policy.state_dict)
    told = refusal_of(policy.load_state_dict, {"seen": 1.0})
    assert f"{name}: load_state_dict({{'seen': 1.0}}) raised KeyError: 'no_such'" in told
