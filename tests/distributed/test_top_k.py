"""Targets of a teacher's top k over ranks: the loss by itself, and a whole training step."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.batch import pack, plan_microbatches
from megatron_prefix.config import LossConfig
from megatron_prefix.loss import top_k_divergence
from megatron_prefix.mcore.groups import initialize_megatron
from megatron_prefix.mcore.optimizer import make_trainable
from megatron_prefix.student import Objective, forward_backward
from megatron_prefix.types import PrefixBatch, TopKTargets
from tests.distributed.ranks import run_ranks
from tests.distributed.world import CPU, LONGEST_PREFIX, Case, build, model_config, rollouts
from tests.tiny_models import write_tiny_qwen3
from tests.unit.loss.reference import Case as LossCase
from tests.unit.loss.reference import make_case, relative_error
from tests.unit.loss.test_top_k import Targets, expected, top_k_of

ROWS, REAL = 204, 199  # over four ranks 51 rows each
DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]


@dataclass(frozen=True)
class RankResult:
    kl: Tensor
    label_logprobs: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor  # this rank's rows


def _on_rank(case: LossCase, targets: Targets, divergence: str, vocab_size: int) -> RankResult:
    hidden = case.student_hidden.clone().requires_grad_()
    shards = case.student_weight.chunk(dist.get_world_size())
    weight = shards[dist.get_rank()].clone().requires_grad_()
    result = top_k_divergence(
        hidden,
        weight,
        targets.ids,
        targets.logprobs,
        case.token_weight,
        divergence,
        0.3,
        1.7,
        vocab_size=vocab_size,
        tp_group=dist.group.WORLD,
        chunk_size=10,
        labels=torch.arange(len(hidden)) * 3 % vocab_size,
    )
    result.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert result.label_logprobs is not None
    return RankResult(result.kl, result.label_logprobs, hidden.grad, weight.grad)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("vocab_size", [REAL, 60])
def test_one_two_and_four_ranks_agree(divergence: str, vocab_size: int) -> None:
    """With 60 real tokens, two of four ranks hold nothing and one holds nine."""
    case = make_case(rows=ROWS)
    targets = top_k_of(case, 16, vocab_size, 1.7)
    reference = expected(case, targets, divergence, vocab_size, 0.3, 1.7)
    (alone,) = run_ranks(1, _on_rank, case, targets, divergence, vocab_size)
    for world_size in (2, 4):
        ranks = run_ranks(world_size, _on_rank, case, targets, divergence, vocab_size)
        whole = torch.cat([rank.weight_gradient for rank in ranks])
        assert relative_error(whole, reference.weight_gradient) < 5e-6
        for rank in ranks:
            assert torch.equal(rank.kl, ranks[0].kl)
            assert relative_error(rank.kl, alone.kl.double()) < 1e-6
            assert relative_error(rank.kl, reference.kl) < 1e-6
            assert relative_error(rank.hidden_gradient, reference.hidden_gradient) < 5e-6
            assert relative_error(rank.label_logprobs, alone.label_logprobs.double()) < 1e-6


@dataclass(frozen=True)
class StepResult:
    loss: float
    kl: Tensor
    grad_norm: float


def _targets(batch: PrefixBatch, vocab: int) -> TopKTargets:
    """Of a teacher that does not exist: drawn from the batch's own labels, alike on all ranks."""
    draw = torch.Generator().manual_seed(int(batch.labels.sum()))
    logits = 2 * torch.randn(len(batch.labels), vocab, generator=draw)
    logprobs, ids = logits.log_softmax(-1).topk(8)
    return TopKTargets(ids, logprobs)


def _step(case: Case, world_size: int) -> StepResult:
    initialize_megatron(1)
    student = make_trainable(build(case.student, world_size, owner="student"), case.optimizer, 100)
    groups, sampled = student.model.groups, rollouts()
    plan = plan_microbatches(sampled, 4, multiple=8)
    mine = plan.of_replica(groups.dp_rank, groups.layout.dp)
    batches = [pack(sampled, plan, m, CPU) for m in mine]
    vocab = student.model.hf.shape.vocab_size
    targets = [_targets(batch, vocab) for batch in batches] if groups.is_last_stage else []
    objective = Objective(LossConfig("jsd"), None)
    sums = forward_backward(student, batches, targets, objective, LONGEST_PREFIX)
    return StepResult(sums.loss, sums.kl, student.update().grad_norm)


def test_a_step_on_top_k_targets_is_the_same_in_every_layout(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path / "student")
    (alone,) = run_ranks(1, _step, Case(model_config(folder), model_config(folder)), 1)
    assert alone.loss > 0.01 and alone.grad_norm > 0.01
    for layout in ({"tp": 2}, {"pp": 2}, {}):
        config = model_config(folder, **layout)
        for rank in run_ranks(2, _step, Case(config, config), 2):
            assert rank.loss == pytest.approx(alone.loss, rel=1e-5)
            assert rank.grad_norm == pytest.approx(alone.grad_norm, rel=1e-4)
            torch.testing.assert_close(rank.kl, alone.kl, rtol=1e-5, atol=1e-7)
