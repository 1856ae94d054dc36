"""Rank 0's decisions: when to stop, how long a prefix may be, when to evaluate, what is kept."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prefix.conductor import Conductor, Staff
from megatron_prefix.config import EvalConfig, LogConfig, PrefixConfig, Recipe, TrainConfig
from megatron_prefix.orders import Order
from megatron_prefix.phases import Phases
from megatron_prefix.prefix import Ledger, ModelShape, build_policy, model_shape
from megatron_prefix.run_log import RunLog
from megatron_prefix.types import Rollout, StepMetrics

STEPS = 10
RECIPE = Recipe(
    train=TrainConfig(steps=STEPS),
    prefix=PrefixConfig(policy="linear", min_length=2, max_length=6),
    eval=EvalConfig(interval=4),
    log=LogConfig(tensorboard=False, sample_rollouts_interval=2),
)
ROLLOUT = Rollout((5, 6), (7, 8), (-0.5, -1.0), "length", 0, 0)
ORDER = Order("train", 2, (ROLLOUT,))


def shape() -> ModelShape:
    return model_shape(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "vocab_size": 10,
        }
    )


@dataclass
class Table:
    """A source that answers from a list and counts what it was asked."""

    asked: list[tuple[int, int, int]] = field(default_factory=list)

    def sample(self, step: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        self.asked.append((step, prefix_length, policy_version))
        return [ROLLOUT]

    def state_dict(self) -> dict[str, Any]:
        return {"asked": len(self.asked)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = [(0, 0, 0)] * state["asked"]


@dataclass(frozen=True)
class Score:
    accuracy: float = 0.5
    n: int = 4
    truncated: int = 1
    tokens: int = 40
    seconds: float = 0.1


@dataclass
class Office:
    """A conductor with everything it directs at hand."""

    folder: Path
    stop: bool = False
    evaluated: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        def evaluate(step: int, policy_version: int) -> Score:
            self.evaluated.append((step, policy_version))
            return Score()

        self.source = Table()
        self.policy = build_policy(RECIPE.prefix, STEPS)
        self.ledger = Ledger(shape(), shape(), RECIPE.prefix.max_length)
        staff = Staff(
            policy=self.policy,
            source=self.source,
            ledger=self.ledger,
            open_log=lambda step: RunLog(self.folder, RECIPE.log, STEPS, resume_step=step),
            decode=lambda ids: " ".join(map(str, ids)),
            evaluate=evaluate,
            stop_requested=lambda: self.stop,
        )
        self.conductor = Conductor(RECIPE, staff)


@pytest.fixture
def office(tmp_path: Path) -> Office:
    return Office(tmp_path)


def metrics(step: int) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=0.7,
        kl_by_position=np.array([1.0, np.nan]),
        tokens_by_position=np.array([3, 0]),
        grad_norm=1.0,
        lr=1e-3,
        skipped=False,
        prefix_length=2,
        prefix_tokens=3,
        prompt_tokens=2,
        cut_fraction=1.0,
        policy_version=step - 1,
        policy_lag=0.0,
        logprob_diff_max=0.0,
        logprob_diff_mean=0.0,
    )


def test_the_policy_decides_the_length_and_the_source_is_asked_for_it(office: Office) -> None:
    first = office.conductor.order(0, 3)
    last = office.conductor.order(STEPS - 1, 12)
    assert (first.kind, first.prefix_length, last.prefix_length) == ("train", 2, 6)
    assert office.source.asked == [(0, 2, 3), (9, 6, 12)]
    assert first.rollouts == (ROLLOUT,)


def test_a_stop_is_obeyed_before_any_rollout_is_asked_for(office: Office) -> None:
    office.stop = True
    assert office.conductor.order(4, 4).kind == "save_and_stop"
    assert office.source.asked == []


def test_evaluations_come_at_both_ends_and_by_interval_once_each(office: Office) -> None:
    for step in range(STEPS + 1):
        office.conductor.evaluate_if_due(step, step)
        office.conductor.evaluate_if_due(step, step)
    assert office.evaluated == [(0, 0), (4, 4), (8, 8), (10, 10)]


def test_a_step_is_accounted_for_logged_and_observed(office: Office) -> None:
    recorded = office.conductor.record(metrics(2), ORDER, Phases())
    office.conductor.close()
    line = json.loads((office.folder / "metrics.jsonl").read_text())
    assert line["flops"]["student"] == recorded.flops.student > 0
    assert office.ledger.total.flops == recorded.flops
    assert recorded.flops_full.total > recorded.flops.total  # it would have gone on to length 6
    sample = json.loads((office.folder / "samples.jsonl").read_text())
    assert (sample["prompt"], sample["prefix"]) == ("5 6", "7 8")


def test_its_state_goes_through_json_and_a_resume_repeats_nothing(office: Office) -> None:
    for step in (1, 2, 3):
        office.conductor.record(metrics(step), ORDER, Phases())
    office.conductor.evaluate_if_due(0, 0)
    office.conductor.order(3, 3)
    state = json.loads(json.dumps(office.conductor.state_dict()))
    office.conductor.close()
    later = Office(office.folder)
    later.conductor.resume(2, state)
    later.conductor.evaluate_if_due(0, 0)
    later.conductor.close()
    assert later.evaluated == []
    assert len(later.source.asked) == 1
    assert later.ledger.total == office.ledger.total
    steps = [json.loads(line)["step"] for line in open(office.folder / "metrics.jsonl")]
    assert steps == [1, 2]  # step 3 came after the checkpoint and is set aside


def test_a_skipped_step_is_told(office: Office) -> None:
    office.conductor.record(replace(metrics(1), skipped=True), ORDER, Phases())
    office.conductor.close()
    kinds = [json.loads(line)["kind"] for line in open(office.folder / "events.jsonl")]
    assert kinds == ["skipped"]


def test_phases_are_disjoint_and_leave_a_rest() -> None:
    phases = Phases()
    with phases.phase("a"):
        pass
    with phases.phase("b"):
        pass
    with phases.phase("a"):
        pass
    seconds = phases.seconds()
    assert list(seconds) == ["a", "b", "other"]
    assert all(value >= 0 for value in seconds.values())
