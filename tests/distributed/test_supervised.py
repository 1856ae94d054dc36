"""Supervised steps and written prefixes over ranks: against transformers, and in every layout."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from megatron_prefix.student import forward_backward
from megatron_prefix.types import Rollout
from megatron_prefix.weighing.prefix_sums import PrefixSums
from tests.distributed.ranks import run_ranks
from tests.distributed.world import (
    LONGEST_PREFIX,
    Case,
    World,
    model_config,
    rollouts,
)

FINAL_NORM = "decoder.final_layernorm.weight"
FC2 = "decoder.layers.1.mlp.linear_fc2.weight"


def as_written(sampled: Sequence[Rollout]) -> list[Rollout]:
    return [
        replace(each, written=True, rollout_logprobs=(math.nan,) * len(each.prefix_ids))
        for each in sampled
    ]


def step(world: World, sampled: Sequence[Rollout], *, supervised: bool) -> PrefixSums:
    plan, batches = world.packed(sampled)
    targets = None if supervised else world.teacher.targets(sampled, plan)
    return forward_backward(world.student, batches, targets, world.objective, LONGEST_PREFIX)


def supervised_gradients(case: Case) -> tuple[PrefixSums, dict[str, torch.Tensor]]:
    world = World.build(case, 1)
    sums = step(world, as_written(rollouts()), supervised=True)
    named = dict(world.student.model.module.named_parameters())
    return sums, {name: named[name].main_grad.clone() for name in (FINAL_NORM, FC2)}


def sums_and_norm(case: Case, world_size: int) -> tuple[PrefixSums, float]:
    world = World.build(case, world_size)
    sums = step(world, as_written(rollouts()), supervised=True)
    return sums, world.student.update().grad_norm


def half_written(case: Case) -> tuple[PrefixSums, PrefixSums]:
    """A step whose sampled half has log-probabilities of 0, and one that has nothing else."""
    world = World.build(case, 1)
    sampled = rollouts()
    mixed = [*as_written(sampled[:4]), *sampled[4:]]
    both = step(world, mixed, supervised=False)
    return both, step(world, as_written(sampled), supervised=False)


def test_loss_and_gradients_are_the_cross_entropys_of_transformers(
    folders: tuple[Path, Path],
) -> None:
    ((sums, mine),) = run_ranks(1, supervised_gradients, Case(*map(model_config, folders)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folders[0], dtype=torch.float64)
    total = sum(len(rollout.prefix_ids) for rollout in rollouts())
    expected = torch.zeros((), dtype=torch.float64)
    for rollout in rollouts():
        ids = torch.tensor([(*rollout.prompt_ids, *rollout.prefix_ids)])
        logits = model(ids[:, :-1]).logits[0, len(rollout.prompt_ids) - 1 :]
        labels = torch.tensor(rollout.prefix_ids)
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / total
        loss.backward()
        expected += loss.detach()
    assert sums.loss == pytest.approx(expected.item(), rel=1e-6)
    gradients = {
        FINAL_NORM: model.model.norm.weight.grad,
        FC2: model.model.layers[1].mlp.down_proj.weight.grad,
    }
    for name, gradient in gradients.items():
        assert (mine[name].double() - gradient).norm() <= 5e-6 * gradient.norm(), name


@pytest.mark.parametrize(
    ("world_size", "student"),
    [(2, (1, 1)), (2, (2, 1)), (2, (1, 2))],
    ids=["dp2", "tp2", "pp2"],
)
def test_every_layout_takes_the_same_supervised_step(
    folders: tuple[Path, Path], world_size: int, student: tuple[int, int]
) -> None:
    teacher = model_config(folders[1])
    ((expected, norm),) = run_ranks(1, sums_and_norm, Case(model_config(folders[0]), teacher), 1)
    case = Case(model_config(folders[0], *student), teacher)
    for sums, grad_norm in run_ranks(world_size, sums_and_norm, case, world_size):
        assert sums.loss == pytest.approx(expected.loss, rel=1e-6)
        torch.testing.assert_close(sums.kl, expected.kl, rtol=1e-5, atol=1e-7)
        assert grad_norm == pytest.approx(norm, rel=1e-5)
        assert (sums.sampled, sums.logprob_diff, sums.worst.difference) == (0.0, 0.0, 0.0)


def test_only_sampled_tokens_are_compared_with_a_servers(folders: tuple[Path, Path]) -> None:
    ((mixed, written),) = run_ranks(1, half_written, Case(*map(model_config, folders)))
    assert mixed.sampled == sum(len(each.prefix_ids) for each in rollouts()[4:])
    assert mixed.worst.server == 0.0 and mixed.worst.trainer < -1.0
    assert mixed.logprob_diff >= mixed.worst.difference
    assert (written.sampled, written.logprob_diff, written.worst.difference) == (0.0, 0.0, 0.0)
    assert mixed.loss == pytest.approx(written.loss)  # who wrote a prefix changes no divergence
