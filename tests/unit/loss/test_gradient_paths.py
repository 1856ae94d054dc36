"""main_grad, tied and frozen weights, evaluation, empty input: who gets which gradient."""

import pytest
import torch
from torch import Tensor

from megatron_prefix.loss import vocab_parallel_kl
from tests.unit.loss.reference import Case, dense, make_case, relative_error

V = 203


def loss_of(case: Case, hidden: Tensor, weight: Tensor, divergence: str = "reverse_kl") -> Tensor:
    loss, _ = vocab_parallel_kl(
        hidden, weight, *case.inputs[2:], divergence, vocab_size=V - 4, chunk_size=10
    )
    return loss


def parameter(weight: Tensor, main_grad_dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    """A weight as Megatron's DDP leaves it: a gradient buffer, and a flag that is down."""
    result = torch.nn.Parameter(weight.clone())
    result.main_grad = torch.zeros(weight.shape, dtype=main_grad_dtype)
    result.grad_added_to_main_grad = False
    return result


def add_when_ready(weight: torch.nn.Parameter, zero_out_wgrad: bool) -> list[int]:
    """The rule of Megatron's backward hook; the returned list grows by one each time it runs."""
    runs: list[int] = []

    def hook(*_: object) -> None:
        if weight.grad is not None and (not weight.grad_added_to_main_grad or zero_out_wgrad):
            weight.main_grad.add_(weight.grad)
        weight.grad = None
        runs.append(1)

    accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulator.register_hook(hook)
    weight.accumulator = accumulator  # keeps the hook alive
    return runs


def test_a_gradient_into_the_loss_scales_both_gradients() -> None:
    case = make_case()
    expected = dense(case, "reverse_kl", V - 4)
    hidden, weight = case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()
    (3.5 * loss_of(case, hidden, weight)).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert relative_error(hidden.grad, 3.5 * expected.hidden_gradient) < 2e-6
    assert relative_error(weight.grad, 3.5 * expected.weight_gradient) < 2e-6


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_main_grad_gathers_over_microbatches_and_the_hook_fires(divergence: str) -> None:
    cases = [make_case(seed=seed) for seed in (0, 1)]
    weight = parameter(cases[0].student_weight)
    runs = add_when_ready(weight, zero_out_wgrad=False)
    expected = torch.zeros(V, 24).double()
    for case in cases:
        case.student_weight.copy_(cases[0].student_weight)
        expected += dense(case, divergence, V - 4).weight_gradient
        hidden = case.student_hidden.requires_grad_()
        loss_of(case, hidden, weight, divergence).backward()
    assert len(runs) == 2 and weight.grad_added_to_main_grad and weight.grad is None
    assert relative_error(weight.main_grad, expected) < 2e-6


def test_the_gradient_handed_to_autograd_beside_main_grad_is_zero() -> None:
    case = make_case(dtype=torch.bfloat16)
    weight = parameter(case.student_weight)
    loss_of(case, case.student_hidden.requires_grad_(), weight).backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert torch.count_nonzero(weight.grad) == 0
    expected = dense(case, "reverse_kl", V - 4).weight_gradient
    assert relative_error(weight.main_grad, expected) < 2e-6


def test_a_narrow_main_grad_is_rounded_once_a_call() -> None:
    case = make_case()
    weight = parameter(case.student_weight, torch.bfloat16)
    loss_of(case, case.student_hidden.requires_grad_(), weight).backward()
    expected = dense(case, "reverse_kl", V - 4).weight_gradient.bfloat16().double()
    assert relative_error(weight.main_grad, expected) < 1e-3


def test_main_grad_refuses_a_loss_that_is_scaled_afterwards() -> None:
    case = make_case()
    loss = loss_of(case, case.student_hidden.requires_grad_(), parameter(case.student_weight))
    with pytest.raises(RuntimeError, match="gradient of the loss must be 1"):
        (loss / 2).backward()


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_tied_embeddings_get_both_gradients(with_main_grad: bool) -> None:
    """One parameter is the embedding and the head, as in Megatron with one pipeline stage."""
    case = make_case()
    tokens = torch.arange(case.student_hidden.shape[0]) % 11
    reference = case.student_weight.double().requires_grad_()
    student = (reference[tokens].tanh() @ reference[: V - 4].T).log_softmax(-1)
    teacher = case.teacher_hidden.double() @ case.teacher_weight[: V - 4].double().T
    kl = (student.exp() * (student - teacher.log_softmax(-1))).sum(-1)
    (kl * case.token_weight).sum().backward()
    assert reference.grad is not None

    weight = parameter(case.student_weight) if with_main_grad else case.student_weight
    if with_main_grad:
        runs = add_when_ready(weight, zero_out_wgrad=True)
    hidden = torch.nn.functional.embedding(tokens, weight.requires_grad_()).tanh()
    loss_of(case, hidden, weight).backward()
    result = weight.main_grad if with_main_grad else weight.grad
    assert relative_error(result, reference.grad) < 2e-6
    assert not with_main_grad or len(runs) == 1


def test_a_frozen_head_still_trains_the_trunk() -> None:
    case = make_case()
    weight = parameter(case.student_weight).requires_grad_(False)
    hidden = case.student_hidden.requires_grad_()
    loss_of(case, hidden, weight).backward()
    assert hidden.grad is not None
    expected = dense(case, "reverse_kl", V - 4).hidden_gradient
    assert relative_error(hidden.grad, expected) < 2e-6
    assert torch.count_nonzero(weight.main_grad) == 0 and not weight.grad_added_to_main_grad


def test_a_frozen_trunk_still_trains_the_head() -> None:
    case = make_case()
    weight = case.student_weight.requires_grad_()
    loss_of(case, case.student_hidden, weight).backward()
    assert weight.grad is not None
    assert relative_error(weight.grad, dense(case, "reverse_kl", V - 4).weight_gradient) < 2e-6


def test_the_teacher_gets_no_gradient() -> None:
    case = make_case()
    case.teacher_hidden.requires_grad_()
    case.teacher_weight.requires_grad_()
    loss_of(case, case.student_hidden.requires_grad_(), case.student_weight).backward()
    assert case.teacher_hidden.grad is None and case.teacher_weight.grad is None


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_evaluation_leaves_main_grad_alone(divergence: str) -> None:
    case = make_case()
    weight = parameter(case.student_weight)
    with torch.no_grad():
        loss = loss_of(case, case.student_hidden.requires_grad_(), weight, divergence)
    assert (
        not loss.requires_grad and relative_error(loss, dense(case, divergence, V - 4).loss) < 1e-6
    )
    assert torch.count_nonzero(weight.main_grad) == 0 and not weight.grad_added_to_main_grad


@pytest.mark.parametrize("with_main_grad", [False, True])
def test_no_position_at_all(with_main_grad: bool) -> None:
    case = make_case(n=0)
    weight = parameter(case.student_weight) if with_main_grad else case.student_weight
    hidden = case.student_hidden.requires_grad_()
    loss = loss_of(case, hidden, weight.requires_grad_())
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None and hidden.grad.shape == (0, 24)
    assert weight.grad is not None and torch.count_nonzero(weight.grad) == 0
    assert not with_main_grad or weight.grad_added_to_main_grad


def test_a_second_backward_is_refused() -> None:
    case = make_case()
    loss = loss_of(case, case.student_hidden.requires_grad_(), case.student_weight)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already run backward"):
        loss.backward()


def test_inputs_are_left_as_they_were() -> None:
    case, untouched = make_case(), make_case()
    loss_of(
        case, case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()
    ).backward()
    for tensor, before in zip(case.inputs, untouched.inputs, strict=True):
        assert torch.equal(tensor, before)
