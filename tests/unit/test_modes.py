"""What each mode asks for, step by step: batches, teacher, servers, weights."""

from dataclasses import replace

import pytest

from megatron_prefix.config import (
    EvalConfig,
    LogConfig,
    LossConfig,
    ModeConfig,
    ModelConfig,
    Recipe,
    RolloutConfig,
    TokenWeightConfig,
    TrainConfig,
)
from megatron_prefix.modes import (
    MODES,
    asks_servers,
    is_supervised,
    more_passes,
    needs_prompts,
    needs_rollouts,
    needs_servers,
    needs_teacher,
    needs_written,
    weight_rule,
    written_count,
)

STEPS, BATCH = 20, 12


def recipe(name: str = "on_policy", **settings: object) -> Recipe:
    mode = replace(ModeConfig(name=name), **settings)
    return Recipe(mode=mode, train=TrainConfig(steps=STEPS, global_batch_size=BATCH))


def test_on_policy_samples_everything_and_syncs_after_every_step_but_the_last() -> None:
    ours = recipe()
    assert [written_count(ours, step) for step in range(STEPS)] == [0] * STEPS
    assert needs_rollouts(ours) and needs_servers(ours) and needs_teacher(ours)
    assert needs_prompts(ours) and not needs_written(ours)
    assert [asks_servers(ours, step) for step in range(STEPS + 1)] == [True] * STEPS + [False]


@pytest.mark.parametrize(("name", "teacher"), [("off_policy", True), ("sft", False)])
def test_written_modes_need_no_server_unless_something_is_evaluated(
    name: str, teacher: bool
) -> None:
    ours = recipe(name)
    assert written_count(ours, 7) == BATCH
    assert is_supervised(ours, 7) is (name == "sft")
    assert needs_teacher(ours) is teacher
    assert not needs_servers(ours) and not needs_prompts(ours) and needs_written(ours)
    assert not any(asks_servers(ours, step) for step in range(STEPS + 1))
    judged = replace(ours, eval=EvalConfig(path="held_out.jsonl", interval=8))
    assert needs_servers(judged)
    assert [step for step in range(STEPS + 1) if asks_servers(judged, step)] == [0, 8, 16, STEPS]
    probed = replace(ours, log=LogConfig(probe_interval=6))
    assert needs_servers(probed) and needs_prompts(probed) and needs_teacher(probed)
    assert [step for step in range(STEPS + 1) if asks_servers(probed, step)] == [0, 6, 12, 18]


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.5, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("samples", [1, 4])
def test_a_mixed_runs_share_holds_to_within_a_prompts_samples(share: float, samples: int) -> None:
    ours = replace(
        recipe("mixed", written_share=share), rollout=RolloutConfig(samples_per_prompt=samples)
    )
    counts = [written_count(ours, step) for step in range(STEPS)]
    assert all(0 <= count <= BATCH and count % samples == 0 for count in counts)
    for steps in range(1, STEPS + 1):
        assert abs(sum(counts[:steps]) - share * BATCH * steps) < samples + 1e-6
    assert counts == [written_count(ours, step) for step in range(STEPS)]
    assert needs_rollouts(ours) is (share < 1) and needs_written(ours) is (share > 0)


def test_a_warm_up_is_supervised_and_hands_over_with_fresh_weights() -> None:
    ours = recipe("on_policy", warmup_steps=5)
    assert [is_supervised(ours, step) for step in range(7)] == [True] * 5 + [False] * 2
    assert [written_count(ours, step) for step in range(7)] == [BATCH] * 5 + [0] * 2
    assert needs_written(ours) and needs_rollouts(ours) and needs_teacher(ours)
    asked = [asks_servers(ours, step) for step in range(STEPS + 1)]
    assert asked == [False] * 5 + [True] * (STEPS - 5) + [False]
    whole = recipe("on_policy", warmup_steps=STEPS)
    assert not needs_rollouts(whole) and not needs_teacher(whole) and not needs_servers(whole)


@pytest.mark.parametrize("name", MODES)
def test_a_replay_asks_nobody(name: str) -> None:
    judged = replace(recipe(name), eval=EvalConfig(path="x.jsonl"), log=LogConfig(probe_interval=1))
    replayed = replace(judged, rollout=RolloutConfig(replay="rollouts"))
    assert not needs_servers(replayed) and not needs_prompts(replayed)
    assert not any(asks_servers(replayed, step) for step in range(STEPS + 1))


def test_tokens_are_weighed_by_reward_while_a_run_explores() -> None:
    weights = LossConfig(weights=TokenWeightConfig("entropy", explore=0.25))
    ours = replace(recipe(), loss=weights)
    rules = [weight_rule(ours, step) for step in range(STEPS)]
    assert rules == ["reward"] * 5 + ["entropy"] * 15
    assert {more_passes(ours, step) for step in range(5)} == {(frozenset({""}), 0)}
    assert {more_passes(ours, step) for step in range(5, STEPS)} == {(frozenset(), 1)}
    served = replace(ours, teacher=ModelConfig(placement="server"))
    assert more_passes(served, 0) == (frozenset(), 0)
    mixed = replace(served, teachers={"math": ModelConfig(), "code": served.teacher})
    assert more_passes(mixed, 0) == (frozenset({"math"}), 0)
    assert more_passes(recipe(), 0) == (frozenset(), 0) and weight_rule(recipe(), 0) == "uniform"
