"""A teacher that reads another prompt scores as transformers does on that prompt."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_prefix.batch import as_teacher_reads
from megatron_prefix.student import forward_backward
from megatron_prefix.types import Rollout
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


def with_teacher_prompts() -> list[Rollout]:
    """Longer ones, shorter ones, and every third rollout with none of its own."""
    own = [tuple(range(3, 3 + 2 + 5 * index)) for index in range(8)]
    return [
        replace(each, teacher_prompt_ids=own[index] if index % 3 else ())
        for index, each in enumerate(rollouts())
    ]


def step(case: Case, world_size: int) -> PrefixSums:
    world, sampled = World.build(case, world_size), with_teacher_prompts()
    plan, batches = world.packed(sampled)
    targets = world.teacher.targets(*as_teacher_reads(sampled, plan))
    return forward_backward(world.student, batches, targets, world.objective, LONGEST_PREFIX)


def expected(folders: tuple[Path, Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the KL and tokens by position, in fp64."""
    dense = Dense.load(folders)
    kl, tokens = torch.zeros(2, LONGEST_PREFIX, dtype=torch.float64)
    for each in with_teacher_prompts():
        values = dense.kl(each).detach()
        kl[: len(values)] += values
        tokens[: len(values)] += 1
    return kl, tokens


@pytest.mark.parametrize(
    ("world_size", "student", "teacher"),
    [(1, (1, 1), (1, 1)), (2, (2, 1), (1, 2)), (2, (1, 2), (2, 1))],
    ids=["one rank", "tp2, teacher pp2", "pp2, teacher tp2"],
)
def test_every_position_is_compared_after_the_teachers_own_prompt(
    folders: tuple[Path, Path],
    world_size: int,
    student: tuple[int, int],
    teacher: tuple[int, int],
) -> None:
    case = Case(model_config(folders[0], *student), model_config(folders[1], *teacher))
    kl, tokens = expected(folders)
    for sums in run_ranks(world_size, step, case, world_size):
        assert torch.equal(sums.tokens, tokens)
        torch.testing.assert_close(sums.kl, kl, rtol=1e-5, atol=1e-6)
        assert sums.loss == pytest.approx(float(kl.sum() / tokens.sum()), rel=1e-5)
