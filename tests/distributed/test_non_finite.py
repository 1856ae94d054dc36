"""A step whose loss is not finite says which input was not, and where."""

import logging

import pytest
import torch

from megatron_prefix.batch import pack, plan_microbatches
from megatron_prefix.student import forward_backward
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
from tests.tiny_models import write_tiny_qwen3


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _poisoned_step(case: Case, where: str) -> list[str]:
    world, kept = World.build(case, 2), _Kept()
    logging.getLogger("megatron_prefix.weighing.prefix_sums").addHandler(kept)
    plan = plan_microbatches(rollouts(), MICROBATCHES, multiple=8)
    batches = [pack(rollouts(), plan, m, CPU) for m in range(MICROBATCHES)]
    targets = world.teacher.targets(rollouts(), plan)
    with torch.no_grad():
        if where == "targets":
            targets[2].hidden[4, 7] = torch.nan
        if where == "weights":
            batches[1].token_weight[2] = torch.inf
        if where == "head" and world.student.model.groups.tp_rank == 1:
            world.student.model.module.embedding.word_embeddings.weight[3, 5] = torch.inf
        if where == "trunk":
            world.student.model.module.decoder.final_layernorm.weight[1] = torch.nan
    sums = forward_backward(world.student, batches, targets, world.objective, LONGEST_PREFIX)
    assert not torch.tensor(sums.loss).isfinite() or where == ""
    return kept.lines


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_tiny_qwen3(tmp_path_factory.mktemp("models") / "student")
    return Case(model_config(folder, tp=2), model_config(folder, tp=2))


def test_a_finite_step_says_nothing(case: Case) -> None:
    assert run_ranks(2, _poisoned_step, case, "") == [[], []]


def test_the_teachers_hidden_states(case: Case) -> None:
    for lines in run_ranks(2, _poisoned_step, case, "targets"):
        assert len(lines) == 1
        assert lines[0].startswith("microbatch 2 of this rank: divergence [")
        assert (
            "has 1 non-finite values; the first, nan, is at [4]: the teacher's hidden" in lines[0]
        )
        assert lines[0].endswith("has 1 non-finite values; the first, nan, is at [4, 7]")


def test_token_weights(case: Case) -> None:
    """The divergence is finite, the loss is not."""
    for lines in run_ranks(2, _poisoned_step, case, "weights"):
        assert len(lines) == 1
        assert lines[0].startswith("microbatch 1 of this rank: token weights [")
        assert lines[0].endswith("has 1 non-finite values; the first, inf, is at [2]")


def test_the_rank_that_holds_a_bad_row_of_the_head_names_it(case: Case) -> None:
    without, holder = run_ranks(2, _poisoned_step, case, "head")
    assert len(holder) == len(without) == MICROBATCHES
    assert (
        "the student's LM head [32, 64] has 1 non-finite values; the first, inf, is at [3, 5]"
        in (holder[0])
    )
    assert "the student's LM head [32, 64] has" not in without[0]


def test_what_is_left_is_the_students_trunk(case: Case) -> None:
    for lines in run_ranks(2, _poisoned_step, case, "trunk"):
        assert len(lines) == MICROBATCHES
        assert all(
            "the student's hidden state there, or another rank's shard" in line for line in lines
        )
