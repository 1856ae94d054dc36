"""A model whose microbatches are cut over context-parallel ranks does what it does on one rank."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prefix.config import TokenWeightConfig
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.student import forward_backward
from megatron_prefix.validate import check_model
from megatron_prefix.weighing.reweigh import reweigh
from megatron_prefix.weighing.token_kl import by_rollout
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import ADAM, steps_from
from tests.distributed.test_layouts import STEPS, check_same_training
from tests.distributed.world import (
    CPU,
    LONGEST_PREFIX,
    Case,
    Run,
    World,
    model_config,
    rollouts,
    train,
)
from tests.tiny_models import (
    write_tiny_deepseek_v2,
    write_tiny_gpt_oss,
    write_tiny_qwen3,
    write_tiny_qwen3_moe,
)

CP2 = {"context_parallel_size": 2}
TP2 = {"tp": 2, "sequence_parallel": True}
PP2 = {"pp": 2}
EP2 = {"expert_model_parallel_size": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 62, "num_key_value_heads": 4, "initializer_range": 0.05}
    teacher = sizes | {"hidden_size": 96, "seed": 1}
    return {
        "student": write_tiny_qwen3(root / "student", num_hidden_layers=2, **sizes),
        "moe student": write_tiny_qwen3_moe(root / "moe_student", **sizes),
        "latent student": write_tiny_deepseek_v2(root / "latent_student", **sizes),
        "teacher": write_tiny_qwen3(root / "teacher", **teacher | {"num_key_value_heads": 2}),
        "moe": write_tiny_qwen3_moe(root / "moe", **teacher),
        "latent": write_tiny_deepseek_v2(root / "latent", **teacher),
        "sinks": write_tiny_gpt_oss(root / "sinks", **sizes),
    }


def pair(
    models: dict[str, Path],
    names: tuple[str, str],
    student: dict[str, object] | None = None,
    teacher: dict[str, object] | None = None,
) -> Case:
    """A student and a teacher by their names."""
    learner = model_config(models[names[0]], **student or {})
    return Case(learner, model_config(models[names[1]], **teacher or {}))


TEACHERS = {
    "cp2, student tp2": (2, "teacher", TP2, CP2),
    "tp2 cp2, student pp2": (4, "teacher", PP2, TP2 | CP2),
    "pp2 cp2": (4, "teacher", {}, PP2 | CP2),
    "cp2 ep2": (2, "moe", {}, CP2 | EP2),
    "cp2 of latent attention": (2, "latent", {}, CP2),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_a_teacher_teaches_as_on_one_rank(
    name: str, models: dict[str, Path], on_one_rank: Callable[[Case, int], Run]
) -> None:
    world_size, taught_by, student, teacher = TEACHERS[name]
    names = "student", taught_by
    case = pair(models, names, student, teacher)
    ranks = run_ranks(world_size, train, case, world_size, STEPS)
    check_same_training(ranks, on_one_rank(pair(models, names), STEPS), models[names[0]])


RECOMPUTE = {"recompute_granularity": "full"}
STUDENTS = {
    "cp4": (4, "student", {"context_parallel_size": 4}, {}),
    "cp2 dp2 recompute, teacher tp2": (4, "student", CP2 | RECOMPUTE, {"tp": 2}),
    "tp2 cp2": (4, "student", TP2 | CP2, {}),
    "pp2 cp2, both": (4, "student", PP2 | CP2, PP2 | CP2),
    "cp2 ep2": (2, "moe student", CP2 | EP2, {}),
    "cp2, experts not spread": (2, "moe student", CP2, CP2),
    "cp2 of latent attention": (2, "latent student", CP2, {}),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_trains_as_on_one_rank(
    name: str, models: dict[str, Path], on_one_rank: Callable[[Case, int], Run]
) -> None:
    world_size, trained, student, teacher = STUDENTS[name]
    names = trained, "teacher"
    case = pair(models, names, student, teacher)
    ranks = run_ranks(world_size, train, case, world_size, STEPS)
    check_same_training(ranks, on_one_rank(pair(models, names), STEPS), models[trained])


def test_sinks_are_not_cut(models: dict[str, Path]) -> None:
    hf, model = read_hf_model(str(models["sinks"])), model_config(models["sinks"], **CP2)
    with pytest.raises(ValueError, match="teacher.context_parallel_size=2: .* set it to 1$"):
        check_model(hf, model, "teacher")


@pytest.mark.parametrize(("saved", "resumed"), [(CP2, {}), ({}, CP2 | EP2)], ids=["from", "to"])
def test_checkpoints_load_with_and_without(
    saved: dict, resumed: dict, models: dict[str, Path], tmp_path: Path
) -> None:
    def ran(settings: dict, save_at: tuple[int, ...]) -> list[tuple[float, float, float]]:
        ranks = settings.get("context_parallel_size", 1)
        student = model_config(models["moe student"], **settings)
        case = Case(student, model_config(models["teacher"]), ADAM)
        return run_ranks(ranks, steps_from, case, tmp_path, ranks, 4, save_at)[0]

    whole, rest = ran(saved, (2,)), ran(resumed, ())
    assert len(rest) == 2
    for mine, theirs in zip(rest, whole[2:], strict=True):
        assert mine == pytest.approx(theirs, rel=5e-6)


def weighted(case: Case, world_size: int, config: TokenWeightConfig) -> tuple[float, list]:
    """The loss, and the KL of each rollout's tokens."""
    world, sampled = World.build(case, world_size), rollouts()
    plan, batches = world.packed(sampled)
    targets, objective = world.teacher.targets(sampled, plan), world.objective
    batches = reweigh(world.student.model, batches, targets, objective, config).batches
    kept: list[torch.Tensor] = []
    sums = forward_backward(world.student, batches, targets, objective, LONGEST_PREFIX, kept)
    return sums.loss, by_rollout(world.student.model.groups, plan, sampled, kept, CPU)


@pytest.mark.parametrize("rule", ["entropy", "discrepancy"])
def test_weights_and_the_kl_of_rollouts_are_those_of_one_rank(
    rule: str, models: dict[str, Path]
) -> None:
    config = TokenWeightConfig(rule, share=0.3)
    teacher, student = models["teacher"], models["student"]
    case = Case(model_config(student), model_config(teacher))
    ((loss, kl),) = run_ranks(1, weighted, case, 1, config)
    cut = Case(model_config(student, **CP2), model_config(teacher))
    for own_loss, own_kl in run_ranks(2, weighted, cut, 2, config):
        assert own_loss == pytest.approx(loss, rel=1e-6)
        for mine, theirs in zip(own_kl, kl, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
