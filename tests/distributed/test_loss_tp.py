"""The loss over tensor-parallel ranks: 1 = 2 = 4, and each reduction exactly once."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.loss import prefix_divergence, vocab_parallel_kl
from megatron_prefix.loss.entropy import vocab_parallel_entropy
from tests.distributed.ranks import run_ranks
from tests.unit.loss.reference import Case, Dense, dense, make_case, relative_error

ROWS = 204  # padded; over four ranks 51 each
REAL = 199


@dataclass(frozen=True)
class Settings:
    divergence: str
    vocab_size: int = REAL
    temperature: float = 1.0
    sequence_parallel: bool = False
    chunk_size: int = 10  # of 37 positions: an odd number of chunks, the last one short


@dataclass(frozen=True)
class RankResult:
    loss: Tensor
    kl: Tensor
    label_logprobs: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor  # this rank's rows


def _labels(case: Case, vocab_size: int) -> Tensor:
    return torch.arange(case.student_hidden.shape[0]) * 7 % vocab_size


def _shard(weight: Tensor) -> Tensor:
    return weight.chunk(dist.get_world_size())[dist.get_rank()].clone()


def _on_rank(case: Case, settings: Settings) -> RankResult:
    hidden = case.student_hidden.clone().requires_grad_()
    weight = _shard(case.student_weight).requires_grad_()
    result = prefix_divergence(
        hidden,
        weight,
        case.teacher_hidden,
        _shard(case.teacher_weight),
        case.token_weight,
        settings.divergence,
        0.3,
        settings.temperature,
        vocab_size=settings.vocab_size,
        tp_group=dist.group.WORLD,
        chunk_size=settings.chunk_size,
        sequence_parallel=settings.sequence_parallel,
        labels=_labels(case, settings.vocab_size),
    )
    result.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert result.label_logprobs is not None
    return RankResult(
        result.loss.detach(), result.kl, result.label_logprobs, hidden.grad, weight.grad
    )


def _reference(case: Case, settings: Settings) -> Dense:
    return dense(case, settings.divergence, settings.vocab_size, 0.3, settings.temperature)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "relaxed_kl"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_one_two_and_four_ranks_agree_with_each_other_and_with_fp64(
    divergence: str, temperature: float
) -> None:
    case, settings = make_case(rows=ROWS), Settings(divergence, temperature=temperature)
    expected = _reference(case, settings)
    (alone,) = run_ranks(1, _on_rank, case, settings)
    assert relative_error(alone.hidden_gradient, expected.hidden_gradient) < 2e-6
    for world_size in (2, 4):
        ranks = run_ranks(world_size, _on_rank, case, settings)
        whole = torch.cat([rank.weight_gradient for rank in ranks])
        assert relative_error(whole, alone.weight_gradient.double()) < 1e-6
        assert relative_error(whole, expected.weight_gradient) < 2e-6
        for rank in ranks:
            assert torch.equal(rank.loss, ranks[0].loss) and torch.equal(rank.kl, ranks[0].kl)
            assert relative_error(rank.loss, alone.loss.double()) < 1e-6
            assert relative_error(rank.kl, expected.kl) < 1e-6
            assert relative_error(rank.hidden_gradient, alone.hidden_gradient.double()) < 1e-6
            assert relative_error(rank.hidden_gradient, expected.hidden_gradient) < 2e-6
            assert relative_error(rank.label_logprobs, alone.label_logprobs.double()) < 1e-6


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd", "relaxed_kl"])
@pytest.mark.parametrize("vocab_size", [51, 60, 153])
def test_ranks_whose_shard_is_all_padding_join_in(divergence: str, vocab_size: int) -> None:
    case, settings = make_case(rows=ROWS), Settings(divergence, vocab_size)
    expected = _reference(case, settings)
    ranks = run_ranks(4, _on_rank, case, settings)
    whole = torch.cat([rank.weight_gradient for rank in ranks])
    assert relative_error(whole, expected.weight_gradient) < 2e-6
    assert torch.count_nonzero(whole[vocab_size:]) == 0
    student = (case.student_hidden @ case.student_weight[:vocab_size].T).double().log_softmax(-1)
    labels = _labels(case, vocab_size)[:, None]
    for rank in ranks:
        assert relative_error(rank.kl, expected.kl) < 1e-6
        assert relative_error(rank.hidden_gradient, expected.hidden_gradient) < 2e-6
        assert relative_error(rank.label_logprobs, student.gather(1, labels)[:, 0]) < 1e-6


def _entropy(case: Case, vocab_size: int) -> Tensor:
    weight = _shard(case.student_weight)
    settings = {"vocab_size": vocab_size, "tp_group": dist.group.WORLD, "chunk_size": 10}
    return vocab_parallel_entropy(case.student_hidden, weight, **settings)


@pytest.mark.parametrize("vocab_size", [60, REAL])
def test_entropies_are_the_same_over_ranks_and_in_fp64(vocab_size: int) -> None:
    case = make_case(rows=ROWS)
    logits = case.student_hidden.double() @ case.student_weight[:vocab_size].double().T
    log_p = logits.log_softmax(-1)
    expected = -(log_p.exp() * log_p).sum(-1)
    for world_size in (1, 4):
        for entropy in run_ranks(world_size, _entropy, case, vocab_size):
            assert relative_error(entropy, expected) < 1e-6


def test_sequence_parallel_leaves_each_rank_its_part() -> None:
    case = make_case(rows=ROWS)
    settings = Settings("reverse_kl", sequence_parallel=True)
    expected = _reference(case, settings).hidden_gradient
    ranks = run_ranks(2, _on_rank, case, settings)
    total = ranks[0].hidden_gradient + ranks[1].hidden_gradient
    assert relative_error(total, expected) < 2e-6
    assert relative_error(ranks[0].hidden_gradient, expected) > 0.1


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_no_position_on_any_rank(divergence: str) -> None:
    for rank in run_ranks(2, _on_rank, make_case(n=0, rows=ROWS), Settings(divergence)):
        assert rank.loss == 0 and rank.kl.shape == (0,) and rank.label_logprobs.shape == (0,)
        assert torch.count_nonzero(rank.weight_gradient) == 0


def _evaluate(case: Case) -> tuple[Tensor, bool]:
    with torch.no_grad():
        loss, _ = vocab_parallel_kl(
            case.student_hidden.requires_grad_(),
            _shard(case.student_weight).requires_grad_(),
            case.teacher_hidden,
            _shard(case.teacher_weight),
            case.token_weight,
            "jsd",
            vocab_size=REAL,
            tp_group=dist.group.WORLD,
        )
    return loss, loss.requires_grad


def test_evaluation_without_gradients() -> None:
    case = make_case(rows=ROWS)
    expected = dense(case, "jsd", REAL).loss
    for loss, requires_grad in run_ranks(2, _evaluate, case):
        assert not requires_grad and relative_error(loss, expected) < 1e-6


def _refuse(case: Case) -> str:
    try:
        _on_rank(case, Settings("reverse_kl", vocab_size=ROWS + 1))
    except ValueError as error:
        return str(error)
    return "accepted"


def test_a_vocabulary_that_does_not_fit_is_refused_on_all_ranks_alike() -> None:
    for told in run_ranks(2, _refuse, make_case(rows=ROWS)):
        assert "vocab_size=205" in told and "204 in all" in told
