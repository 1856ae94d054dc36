"""Memory for logits, of the right size and kept where asked to be; zeros that cost nothing."""

import pytest
import torch

from megatron_prefix.loss import Workspace, prefix_divergence
from megatron_prefix.loss.buffers import zeros_never_read
from tests.unit.loss.reference import dense, make_case, relative_error

CPU = torch.device("cpu")


@pytest.mark.parametrize("huge_pages", [True, False])
def test_a_workspace_is_used_again_and_grows(huge_pages: bool) -> None:
    workspace = Workspace(huge_pages=huge_pages)
    first = workspace.logits(2, (4, 10), CPU)
    again = workspace.logits(2, (3, 11), CPU)
    assert [each.shape for each in again] == [(3, 11), (3, 11)]
    assert [each.data_ptr() for each in again] == [each.data_ptr() for each in first]
    grown = workspace.logits(4, (4, 11), CPU)
    assert len({each.data_ptr() for each in grown}) == 4
    assert all(each.shape == (4, 11) and each.is_contiguous() for each in grown)


@pytest.mark.parametrize("shape", [(3, 5), (0, 5), (300, 4099)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros_that_nobody_reads_are_zeros_all_the_same(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    zeros = zeros_never_read(torch.empty((), dtype=dtype).expand(shape))
    assert zeros.shape == shape and zeros.dtype == dtype and zeros.is_contiguous()
    assert torch.count_nonzero(zeros) == 0
    zeros += 1
    assert bool((zeros == 1).all())


def test_calls_that_share_a_workspace_do_not_disturb_each_other() -> None:
    workspace = Workspace()
    for n, divergence in ((37, "jsd"), (12, "reverse_kl"), (50, "forward_kl")):
        case = make_case(n=n, seed=n)
        hidden, weight = case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()
        result = prefix_divergence(
            *case.inputs, divergence, vocab_size=203, chunk_size=20, workspace=workspace
        )
        result.loss.backward()
        expected = dense(case, divergence, 203)
        assert hidden.grad is not None and weight.grad is not None
        assert relative_error(result.kl, expected.kl) < 1e-6
        assert relative_error(hidden.grad, expected.hidden_gradient) < 5e-6
        assert relative_error(weight.grad, expected.weight_gradient) < 5e-6
