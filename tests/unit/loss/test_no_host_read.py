"""The loss never reads a device's memory back: on tensors without memory any read raises."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_prefix.loss import FiniteCheck, prefix_divergence, top_k_divergence
from tests.unit.loss.reference import Case, make_case

DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]
META = torch.device("meta")


def nowhere(dtype: torch.dtype = torch.bfloat16) -> Case:
    case = make_case(dtype=dtype)
    return replace(case, **{name: tensor.to(META) for name, tensor in vars(case).items()})


def leaves(case: Case, main_grad: bool) -> tuple[Tensor, Tensor]:
    hidden, weight = case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()
    if main_grad:
        weight.main_grad = torch.zeros(weight.shape, device=META)
    return hidden, weight


def test_a_read_raises_here() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device=META).item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(3, device=META)[torch.zeros((), dtype=torch.int64, device=META)]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("main_grad", [True, False])
def test_the_loss(divergence: str, main_grad: bool) -> None:
    case = nowhere()
    hidden, weight = leaves(case, main_grad)
    labels = torch.zeros(37, dtype=torch.int64, device=META)
    settings = {"vocab_size": 199, "chunk_size": 10, "labels": labels}
    heads = hidden, weight, *case.inputs[2:]
    result = prefix_divergence(*heads, divergence, 0.3, 1.5, **settings)
    result.loss.backward()
    assert hidden.grad is not None and hidden.grad.shape == (37, 24)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_loss_of_top_k_targets(divergence: str) -> None:
    case = nowhere()
    hidden, weight = leaves(case, main_grad=True)
    ids = torch.zeros(37, 4, dtype=torch.int64, device=META)
    heads = hidden, weight, ids, torch.zeros(37, 4, device=META), case.token_weight
    result = top_k_divergence(*heads, divergence, vocab_size=199, chunk_size=10)
    result.loss.backward()
    assert hidden.grad is not None and result.kl.shape == (37,)


def test_a_look_for_what_is_not_finite() -> None:
    assert FiniteCheck.of("hidden", torch.zeros(5, 7, device=META)).found.shape == (3,)
