"""Cross-entropy over tensor-parallel ranks: one, two and four agree, and with dense fp64."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.loss import prefix_cross_entropy
from tests.distributed.ranks import run_ranks
from tests.unit.loss.reference import Case, make_case, relative_error

ROWS = 204  # padded; over four ranks 51 each
REAL = 103  # with four ranks the last shard holds no real row


def on_rank(case: Case, labels: Tensor, sequence_parallel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Token values, gradients to the hidden states and to this rank's rows."""
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.chunk(dist.get_world_size())[dist.get_rank()].clone()
    weight.requires_grad_()
    result = prefix_cross_entropy(
        hidden,
        weight,
        labels,
        case.token_weight,
        vocab_size=REAL,
        tp_group=dist.group.WORLD,
        chunk_size=10,
        sequence_parallel=sequence_parallel,
    )
    result.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return result.kl, hidden.grad, weight.grad


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_agree_with_fp64(world_size: int, sequence_parallel: bool) -> None:
    case = make_case(rows=ROWS)
    labels = torch.arange(case.student_hidden.shape[0]) * 7 % REAL
    hidden = case.student_hidden.double().requires_grad_()
    weight = case.student_weight.double().requires_grad_()
    each = -(hidden @ weight[:REAL].T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (case.token_weight.double() * each).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    ranks = run_ranks(world_size, on_rank, case, labels, sequence_parallel)
    parts = [rank[1].double() for rank in ranks]
    whole = sum(parts) if sequence_parallel and world_size > 1 else parts[0]
    assert isinstance(whole, Tensor)
    assert relative_error(whole, hidden.grad) < 2e-6
    assert relative_error(torch.cat([rank[2] for rank in ranks]), weight.grad) < 2e-6
    for values, _, _ in ranks:
        assert torch.equal(values, ranks[0][0])
        assert relative_error(values, each.detach()) < 2e-6
