"""Agreement of the gradients of prefix and full rollouts: against transformers, in every layout,
and without a trace in the training."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_prefix.student import forward_backward
from megatron_prefix.weighing.agreement import Audit, audit_gradients
from megatron_prefix.weighing.prefix_sums import PrefixSums
from megatron_prefix.weighing.token_kl import by_rollout
from tests.distributed.dense import Dense
from tests.distributed.ranks import run_ranks
from tests.distributed.world import (
    CPU,
    LONGEST_PREFIX,
    MICROBATCHES,
    Case,
    World,
    model_config,
    rollouts,
)

PREFIX = 6  # the rollouts have 1 to 17 tokens


def audit(world: World) -> Audit:
    sampled = rollouts(seed=5)
    plan, batches = world.packed(sampled)
    targets = world.teacher.targets(sampled, plan)
    return audit_gradients(world.student, batches, targets, world.objective, LONGEST_PREFIX, PREFIX)


def trained(case: Case, world_size: int, probed: bool) -> tuple[Audit | None, dict, float]:
    """Two steps, with or without an audit between them: the weights, and the gradient it left."""
    world = World.build(case, world_size)
    world.step(rollouts())
    world.student.update()
    seen = audit(world) if probed else None
    module = world.student.model.module
    left = sum(float(param.main_grad.abs().sum()) for param in module.parameters())
    assert module.training
    world.step(rollouts(seed=1))
    world.student.update()
    return seen, world.weights(), left


def reference_agreement(folders: tuple[Path, Path]) -> float:
    """By autograd over whole fp64 models, before any step."""
    dense, gradients = Dense.load(folders), []
    for longest in (LONGEST_PREFIX, PREFIX):
        dense.student.zero_grad()
        for rollout in rollouts(seed=5):
            dense.kl(rollout)[:longest].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in dense.student.parameters()]))
    return float(torch.nn.functional.cosine_similarity(*gradients, dim=0))


def agreement(case: Case, world_size: int) -> float:
    return audit(World.build(case, world_size)).agreement


@pytest.mark.parametrize(
    ("world_size", "student", "teacher"),
    [(1, (1, 1), (1, 1)), (2, (1, 1), (1, 1)), (2, (2, 1), (1, 2)), (2, (1, 2), (2, 1))],
    ids=["one rank", "dp2", "tp2, teacher pp2", "pp2, teacher tp2"],
)
def test_agreement_is_the_whole_models_cosine_in_every_layout(
    folders: tuple[Path, Path],
    world_size: int,
    student: tuple[int, int],
    teacher: tuple[int, int],
) -> None:
    """The embedding is tied: both pipeline stages hold it, and it counts once."""
    case = Case(model_config(folders[0], *student), model_config(folders[1], *teacher))
    expected = reference_agreement(folders)
    assert 0.1 < expected < 0.99
    for seen in run_ranks(world_size, agreement, case, world_size):
        assert seen == pytest.approx(expected, abs=2e-5)


def recomputed(case: Case) -> tuple[float, set[bool], int]:
    """The agreement, whether each call of the first layer kept gradients, and calls a microbatch.

    A layer that recomputes is called without them, and once more in its backward.
    """
    world, calls = World.build(case, 1), list[bool]()
    layer = world.student.model.module.decoder.layers[0]
    layer.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    return audit(world).agreement, set(calls), len(calls) // MICROBATCHES


def test_an_audit_recomputes_activations_as_a_step_does(folders: tuple[Path, Path]) -> None:
    plain = Case(*map(model_config, folders))
    full = replace(plain, student=replace(plain.student, recompute_granularity="full"))
    ((expected, kept, calls),) = run_ranks(1, recomputed, plain)
    assert (kept, calls) == ({True}, 2)
    assert run_ranks(1, recomputed, full) == [(expected, {False, True}, 4)]


def token_kl(case: Case, world_size: int) -> tuple[list[np.ndarray], PrefixSums]:
    world, sampled = World.build(case, world_size), rollouts()
    plan, batches = world.packed(sampled, loss_start=2)
    targets, own = world.teacher.targets(sampled, plan), list[torch.Tensor]()
    sums = forward_backward(world.student, batches, targets, world.objective, LONGEST_PREFIX, own)
    return by_rollout(world.student.model.groups, plan, sampled, own, CPU), sums


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((1, 2), (2, 1))],
    ids=["dp2", "tp2, teacher pp2", "pp2, teacher tp2"],
)
def test_each_rollouts_own_kl_is_known_on_every_rank(
    folders: tuple[Path, Path], student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    case = Case(model_config(folders[0], *student), model_config(folders[1], *teacher))
    for kl, sums in run_ranks(2, token_kl, case, 2):
        by_position = np.zeros(LONGEST_PREFIX)
        for values, rollout in zip(kl, rollouts(), strict=True):
            assert len(values) == max(len(rollout.prefix_ids) - 2, 0)
            by_position[2 : 2 + len(values)] += values
        np.testing.assert_allclose(by_position, sums.kl.numpy(), rtol=1e-5, atol=1e-6)
    ((one, _),) = run_ranks(1, token_kl, Case(*map(model_config, folders)), 1)
    for values, expected in zip(kl, one, strict=True):
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_goes_on_to_the_last_bit_as_if_no_probe_had_been(
    folders: tuple[Path, Path], world_size: int
) -> None:
    case = Case(*map(model_config, folders))
    probed = run_ranks(world_size, trained, case, world_size, True)
    plain = run_ranks(world_size, trained, case, world_size, False)
    for (seen, weights, left), (_, expected, _) in zip(probed, plain, strict=True):
        assert seen is not None and left == 0.0
        assert sorted(weights) == sorted(expected)
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
