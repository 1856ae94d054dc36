"""Values and gradients on one rank against dense fp64 autograd."""

import pytest
import torch
from torch import Tensor

from megatron_prefix.loss import DivergenceResult, prefix_divergence
from tests.unit.loss.reference import Case, dense, make_case, relative_error

DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]


def run(
    case: Case,
    divergence: str,
    vocab_size: int,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    labels: Tensor | None = None,
) -> tuple[DivergenceResult, Tensor, Tensor]:
    """The result, ``dh`` and ``dW``, with a gradient of 1 into the loss."""
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone().requires_grad_()
    result = prefix_divergence(
        hidden,
        weight,
        *case.inputs[2:],
        divergence,
        beta,
        temperature,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        labels=labels,
    )
    result.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return result, hidden.grad, weight.grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("n, rows, vocab_size", [(37, 203, 203), (37, 203, 198), (1, 3, 2)])
def test_value_and_gradients(
    divergence: str, temperature: float, n: int, rows: int, vocab_size: int
) -> None:
    case = make_case(n, rows, seed=1)
    case.token_weight[0] = 0.25
    expected = dense(case, divergence, vocab_size, 0.3, temperature)
    result, dh, dw = run(
        case, divergence, vocab_size, beta=0.3, temperature=temperature, chunk_size=10
    )
    assert relative_error(result.loss, expected.loss) < 1e-6
    assert relative_error(result.kl, expected.kl) < 1e-6
    assert relative_error(dh, expected.hidden_gradient) < 5e-6
    assert relative_error(dw, expected.weight_gradient) < 5e-6
    assert torch.count_nonzero(dw[vocab_size:]) == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_close_to_its_teacher_keeps_its_digits(divergence: str) -> None:
    case = make_case(200, 1003, spread=0.2)
    expected = dense(case, divergence, 1003)
    result, dh, dw = run(case, divergence, 1003)
    assert expected.kl.mean() < 0.05
    assert relative_error(result.loss, expected.loss) < 1e-6
    assert relative_error(dh, expected.hidden_gradient) < 5e-6
    assert relative_error(dw, expected.weight_gradient) < 5e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("spread", [60.0, 400.0])
def test_saturated_distributions(divergence: str, spread: float) -> None:
    """Almost all probability on tokens to which the other model gives none (exp underflows)."""
    case = make_case(64, 301, spread=spread)
    expected = dense(case, divergence, 301, beta=0.2)
    result, dh, dw = run(case, divergence, 301, beta=0.2)
    assert relative_error(result.kl, expected.kl) < 1e-6
    for gradient, reference in ((dh, expected.hidden_gradient), (dw, expected.weight_gradient)):
        # At 400 the gradient of jsd is nought but the reference's own rounding.
        assert (gradient - reference).norm() < 1e-4 * reference.norm() + 1e-15


def test_a_saturated_jsd_still_has_the_right_small_gradient() -> None:
    """Disjoint supports: p_s (sp(a) - K) is tiny and comes from the tails alone."""
    case = make_case(16, 64, d_s=64, d_t=64, spread=0.0)
    case.student_weight.copy_(torch.eye(64))
    case.teacher_weight.copy_(torch.eye(64))
    case.student_hidden[:, :32] += 30.0
    case.teacher_hidden[:, 32:] += 30.0
    expected = dense(case, "jsd", 64)
    result, dh, _ = run(case, "jsd", 64)
    assert expected.hidden_gradient.abs().max() < 1e-6
    assert relative_error(result.kl, expected.kl) < 1e-6
    assert relative_error(dh, expected.hidden_gradient) < 1e-4


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_no_divergence(divergence: str) -> None:
    case = make_case(20, 101, d_s=16, d_t=16)
    same = Case(*case.inputs[:2], *case.inputs[:2], case.token_weight)
    result, dh, dw = run(same, divergence, 101)
    assert result.kl.abs().max() < 1e-7
    assert dh.abs().max() < 1e-7 and dw.abs().max() < 1e-7


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_chunk_does_not_matter(divergence: str) -> None:
    case = make_case(300, 97)
    whole, whole_dh, whole_dw = run(case, divergence, 97, chunk_size=300)
    for chunk_size in (None, 1, 7, 299, 1000):
        result, dh, dw = run(case, divergence, 97, chunk_size=chunk_size)
        assert relative_error(result.kl, whole.kl.double()) < 1e-6
        assert relative_error(dh, whole_dh.double()) < 1e-6
        assert relative_error(dw, whole_dw.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_narrow_inputs_are_only_rounded_on_their_way_out(
    dtype: torch.dtype, divergence: str
) -> None:
    """bf16 logits would be off by more than 1%; here the results' own rounding is all there is."""
    case = make_case(40, 5003, spread=1.0, dtype=dtype)
    expected = dense(case, divergence, 5001)
    result, dh, dw = run(case, divergence, 5001, chunk_size=16)
    assert dh.dtype == dtype and dw.dtype == dtype
    assert relative_error(result.kl, expected.kl) < 1e-6
    assert relative_error(dh, expected.hidden_gradient.to(dtype).double()) < 3e-3
    assert relative_error(dw, expected.weight_gradient.to(dtype).double()) < 3e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_label_logprobs_are_at_temperature_one(divergence: str, temperature: float) -> None:
    case = make_case(23, 131)
    labels = torch.arange(23) * 5
    labels[3], labels[4] = 127, -100  # the first padded row, and no token at all
    result, _, _ = run(case, divergence, 127, temperature=temperature, chunk_size=6, labels=labels)
    logits = case.student_hidden.double() @ case.student_weight[:127].double().T
    expected = logits.log_softmax(-1).gather(1, labels.clamp(0, 126)[:, None])[:, 0]
    assert result.label_logprobs is not None and not result.label_logprobs.requires_grad
    inside = (labels >= 0) & (labels < 127)
    assert relative_error(result.label_logprobs[inside], expected[inside]) < 1e-6
    assert result.label_logprobs.isnan().tolist() == (~inside).tolist()


def test_results_are_detached_fp32() -> None:
    result, _, _ = run(make_case(), "reverse_kl", 203)
    assert result.label_logprobs is None
    assert result.kl.dtype == result.loss.dtype == torch.float32
    assert not result.kl.requires_grad and result.loss.requires_grad
