"""Settings that a run never comes to: each is named before it starts, and stops nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prefix.config import (
    AdaptiveConfig,
    AnchoredConfig,
    CheckpointConfig,
    CutOffConfig,
    EvalConfig,
    LateConfig,
    LinearConfig,
    LogConfig,
    LossConfig,
    ModeConfig,
    PrefixConfig,
    RecallConfig,
    Recipe,
    RolloutConfig,
    TeacherPromptConfig,
    TokenWeightConfig,
    TrainConfig,
    WindowConfig,
)
from megatron_prefix.prefix.registry import POLICIES
from megatron_prefix.recipe import load_recipe
from megatron_prefix.rollout.records import save_rollouts
from megatron_prefix.validate.idle import idle_settings

TEN_STEPS = TrainConfig(steps=10)
LONG = PrefixConfig("fixed", 9, 75)


def prefix(policy: str, low: int = 9, high: int = 75, **settings: object) -> Recipe:
    return Recipe(prefix=PrefixConfig(policy, low, high, **settings), train=TEN_STEPS)  # type: ignore[arg-type]


def weights(min_tokens: int) -> Recipe:
    config = LossConfig(weights=TokenWeightConfig("change_point", min_tokens=min_tokens))
    return Recipe(loss=config, prefix=LONG, train=TEN_STEPS)


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (prefix("anchored", anchored=AnchoredConfig(11)), "prefix.policy=anchored stays at"),
        (prefix("late", late=LateConfig(1.0)), "min_length=9 in all of train.steps=10"),
        (prefix("linear", 9, 10, linear=LinearConfig(1.0)), "prefix.policy=linear stays at"),
        (
            Recipe(mode=ModeConfig(warmup_steps=10), prefix=LONG, train=TEN_STEPS),
            "mode.warmup_steps=10 leaves none of train.steps=10 to mode.name=on_policy",
        ),
        (
            Recipe(log=LogConfig(probe_interval=11), prefix=LONG, train=TEN_STEPS),
            "train.steps=10 ends before log.probe_interval=11 comes round",
        ),
        (
            Recipe(
                eval=EvalConfig(path="held_out.jsonl", interval=50),
                checkpoint=CheckpointConfig(save_interval=20),
                mode=ModeConfig(refresh_teacher_every=30),
                prefix=LONG,
                train=TEN_STEPS,
            ),
            "before eval.interval=50, checkpoint.save_interval=20, mode.refresh_teacher_every=30",
        ),
        (
            prefix("fixed", cut_off=CutOffConfig("surprisal", min_tokens=75)),
            "prefix.cut_off asks for 75 tokens (min_tokens, window)",
        ),
        (prefix("fixed", recall=RecallConfig(0.1, window=80)), "prefix.recall asks for 80 tokens"),
        (weights(38), "loss.weights.min_tokens=38 on both sides"),
        (
            replace(
                prefix("fixed", cut_off=CutOffConfig("surprisal"), recall=RecallConfig(0.1)),
                mode=ModeConfig("off_policy"),
                rollout=RolloutConfig(over_sample=1.5),
            ),
            "prefix.cut_off.rule=surprisal, prefix.recall.threshold=0.1, rollout.over_sample=1.5: "
            "for sampled rollouts, and no step of mode.name=off_policy has any",
        ),
        (
            Recipe(
                loss=LossConfig("jsd", weights=TokenWeightConfig("entropy")),
                mode=ModeConfig("sft", teacher_prompt=TeacherPromptConfig("Hm. {prompt}")),
                prefix=LONG,
                train=TEN_STEPS,
            ),
            "loss.divergence=jsd, loss.weights.rule=entropy, mode.teacher_prompt: for a teacher, "
            "and no step of mode.name=sft has one",
        ),
        (
            prefix("late", window=WindowConfig(start=5)),
            "prefix.window has settings, which prefix.policy=late does not read",
        ),
        (
            prefix("adaptive", adaptive=AdaptiveConfig(on_tail="grow")),
            "prefix.adaptive.on_tail=grow answers probes, and log.probe_interval is 0",
        ),
        (
            replace(prefix("fixed"), mode=ModeConfig(written_share=0.3)),
            "mode.written_share=0.3 is for mode.name=mixed, and here it is on_policy",
        ),
        (
            replace(
                prefix("fixed"), mode=ModeConfig(teacher_prompt=TeacherPromptConfig(max_length=9))
            ),
            "mode.teacher_prompt.max_length=9 bounds a prompt of the teacher's own",
        ),
    ],
)
def test_what_a_run_never_comes_to_is_named_in_one_line(recipe: Recipe, named: str) -> None:
    (sentence,) = idle_settings(recipe)
    assert named in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    "recipe",
    [
        *(prefix(policy) for policy in POLICIES),
        prefix("anchored", anchored=AnchoredConfig(10)),
        prefix("late", late=LateConfig(0.9)),
        prefix("linear", 75, 75),
        prefix("fixed", cut_off=CutOffConfig("surprisal", min_tokens=74)),
        prefix("fixed", cut_off=CutOffConfig(min_tokens=500), recall=RecallConfig(min_tokens=500)),
        Recipe(eval=EvalConfig(interval=50), prefix=LONG, train=TEN_STEPS),  # and nothing to ask
        Recipe(mode=ModeConfig("sft", warmup_steps=10), prefix=LONG, train=TEN_STEPS),
        Recipe(log=LogConfig(probe_interval=10), prefix=LONG, train=TEN_STEPS),
        weights(37),
        replace(prefix("fixed"), mode=ModeConfig("mixed", written_share=0.3)),
        replace(
            prefix("adaptive", adaptive=AdaptiveConfig(on_tail="hold")),
            log=LogConfig(probe_interval=5),
        ),
        replace(prefix("fixed"), rollout=RolloutConfig(over_sample=2.0)),
    ],
)
def test_what_a_run_comes_to_is_no_matter(recipe: Recipe) -> None:
    assert idle_settings(recipe) == []


def test_a_replay_with_fewer_steps_than_the_run_is_named(tmp_path: Path) -> None:
    replayed = replace(prefix("fixed"), rollout=RolloutConfig(replay=str(tmp_path)))
    for step in range(9):
        save_rollouts(tmp_path, step, [])
    (sentence,) = idle_settings(replayed)
    assert f"rollout.replay={tmp_path} has 9 steps of train.steps=10" in sentence
    save_rollouts(tmp_path, 9, [])
    assert idle_settings(replayed) == []


def test_recipes_of_this_project_are_whole() -> None:
    for path in sorted((Path(__file__).parents[2] / "recipes").glob("*.py")):
        assert idle_settings(load_recipe(str(path))) == [], path.name
