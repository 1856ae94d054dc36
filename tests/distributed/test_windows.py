"""Losses on a window of the prefix, and probes: against transformers, and in every layout."""

from pathlib import Path

import pytest
import torch

from megatron_prefix.student import forward_backward, score
from megatron_prefix.weighing.prefix_sums import PrefixSums
from tests.distributed.dense import Dense
from tests.distributed.ranks import run_ranks
from tests.distributed.world import (
    LONGEST_PREFIX,
    Case,
    World,
    model_config,
    rollouts,
)

# The prefixes have 1 to 17 tokens: with the second window most microbatches hold nothing to score.
STARTS = (6, 16)
FINAL_NORM = "decoder.final_layernorm.weight"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


def windowed_step(world: World, start: int) -> PrefixSums:
    sampled = rollouts()
    plan, batches = world.packed(sampled, loss_start=start)
    targets = world.teacher.targets(sampled, plan)
    return forward_backward(world.student, batches, targets, world.objective, LONGEST_PREFIX)


def gradients(case: Case, start: int) -> dict[str, torch.Tensor]:
    world = World.build(case, 1)
    windowed_step(world, start)
    named = dict(world.student.model.module.named_parameters())
    return {name: named[name].main_grad.clone() for name in (FINAL_NORM, FC2)}


def sums_and_norm(case: Case, world_size: int, start: int) -> tuple[PrefixSums, float]:
    world = World.build(case, world_size)
    sums = windowed_step(world, start)
    return sums, world.student.update().grad_norm


@pytest.mark.parametrize("start", STARTS)
def test_gradients_are_those_of_the_window_alone(folders: tuple[Path, Path], start: int) -> None:
    (mine,) = run_ranks(1, gradients, Case(*map(model_config, folders)), start)
    dense = Dense.load(folders)
    total = sum(max(len(r.prefix_ids) - start, 0) for r in rollouts())
    for rollout in rollouts():
        (dense.kl(rollout)[start:].sum() / total).backward()
    model = dense.student
    expected = {
        FINAL_NORM: model.model.norm.weight.grad,
        FC2: model.model.layers[1].mlp.down_proj.weight.grad,
    }
    for name, gradient in expected.items():
        assert (mine[name].double() - gradient).norm() <= 5e-6 * gradient.norm(), name


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("student", "teacher"), [((1, 1), (1, 1)), ((1, 2), (2, 1))], ids=["dp2", "pp2, teacher tp2"]
)
def test_a_window_is_the_same_in_every_layout(
    folders: tuple[Path, Path], student: tuple[int, int], teacher: tuple[int, int], start: int
) -> None:
    one_case = Case(*map(model_config, folders))
    case = Case(model_config(folders[0], *student), model_config(folders[1], *teacher))
    ((one, one_norm),) = run_ranks(1, sums_and_norm, one_case, 1, start)
    assert one.tokens[:start].sum() == 0 and one.tokens[start:].min() >= 1
    for sums, norm in run_ranks(2, sums_and_norm, case, 2, start):
        assert sums.loss == pytest.approx(one.loss, rel=1e-6)
        assert norm == pytest.approx(one_norm, rel=2e-6)
        assert torch.equal(sums.tokens, one.tokens)
        torch.testing.assert_close(sums.kl, one.kl, rtol=1e-5, atol=1e-6)


def scored_then_trained(case: Case, world_size: int) -> tuple[PrefixSums, PrefixSums, float]:
    """A probe of the rollouts that are trained on next; and the gradient that it left."""
    world = World.build(case, world_size)
    sampled = rollouts()
    plan, batches = world.packed(sampled)
    targets = world.teacher.targets(sampled, plan)
    world.student.zero_grad()
    probed = score(world.student, batches, targets, world.objective, LONGEST_PREFIX)
    module = world.student.model.module
    left = sum(float(param.main_grad.abs().sum()) for param in module.parameters())
    assert module.training
    return probed, windowed_step(world, 0), left


@pytest.mark.parametrize(
    ("world_size", "student", "teacher"),
    [(1, (1, 1), (1, 1)), (2, (1, 1), (1, 1)), (2, (2, 1), (1, 2)), (2, (1, 2), (2, 1))],
    ids=["one rank", "dp2", "tp2, teacher pp2", "pp2, teacher tp2"],
)
def test_a_probe_sees_what_a_step_sees_and_leaves_no_gradient(
    folders: tuple[Path, Path],
    world_size: int,
    student: tuple[int, int],
    teacher: tuple[int, int],
) -> None:
    case = Case(model_config(folders[0], *student), model_config(folders[1], *teacher))
    for probed, trained, left in run_ranks(world_size, scored_then_trained, case, world_size):
        assert left == 0.0
        assert torch.equal(probed.tokens, trained.tokens)
        torch.testing.assert_close(probed.kl, trained.kl, rtol=1e-5, atol=1e-7)
        assert probed.loss == pytest.approx(trained.loss, rel=1e-6)
