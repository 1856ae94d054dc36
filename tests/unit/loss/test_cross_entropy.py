"""Cross-entropy against dense fp64: values, gradients, edges."""

import pytest
import torch
from torch import Tensor

from megatron_prefix.loss import prefix_cross_entropy
from tests.unit.loss.reference import Case, make_case, relative_error

ROWS, REAL = 203, 197


def labels_of(case: Case, vocab_size: int = REAL) -> Tensor:
    return torch.arange(case.student_hidden.shape[0]) * 11 % vocab_size


def reference(case: Case, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each token, gradients to the hidden states and to the head; fp64."""
    hidden = case.student_hidden.double().requires_grad_()
    weight = case.student_weight.double().requires_grad_()
    logprobs = (hidden @ weight[:REAL].T).log_softmax(-1)
    each = -logprobs.gather(1, labels[:, None])[:, 0]
    (case.token_weight.double() * each).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return each.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_size", [None, 1, 10])
@pytest.mark.parametrize("spread", [0.1, 2.0, 30.0])
def test_values_and_gradients_are_those_of_fp64(spread: float, chunk_size: int | None) -> None:
    case = make_case(rows=ROWS, spread=spread)
    labels = labels_of(case)
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone().requires_grad_()
    result = prefix_cross_entropy(
        hidden, weight, labels, case.token_weight, vocab_size=REAL, chunk_size=chunk_size
    )
    result.loss.backward()
    each, hidden_gradient, weight_gradient = reference(case, labels)
    assert hidden.grad is not None and weight.grad is not None
    assert relative_error(result.kl, each) < 2e-6
    assert result.loss.item() == pytest.approx(
        float((case.token_weight.double() * each).sum()), rel=2e-6
    )
    assert relative_error(hidden.grad, hidden_gradient) < 2e-6
    assert relative_error(weight.grad, weight_gradient) < 2e-6
    assert float(weight.grad[REAL:].abs().sum()) == 0.0  # padded rows


def test_bf16_inputs_keep_fp32_logits() -> None:
    case = make_case(rows=ROWS, dtype=torch.bfloat16)
    labels = labels_of(case)
    result = prefix_cross_entropy(
        case.student_hidden, case.student_weight, labels, case.token_weight, vocab_size=REAL
    )
    assert relative_error(result.kl, reference(case, labels)[0]) < 2e-6


def test_the_labels_log_probability_is_its_own_cross_entropy() -> None:
    case = make_case(rows=ROWS)
    result = prefix_cross_entropy(
        case.student_hidden,
        case.student_weight,
        labels_of(case),
        case.token_weight,
        vocab_size=REAL,
    )
    assert result.label_logprobs is not None
    torch.testing.assert_close(result.label_logprobs, -result.kl, rtol=1e-6, atol=1e-6)


def test_no_position_is_no_loss() -> None:
    case = make_case(n=0, rows=ROWS)
    result = prefix_cross_entropy(
        case.student_hidden,
        case.student_weight,
        torch.zeros(0, dtype=torch.int64),
        case.token_weight,
        vocab_size=REAL,
    )
    assert result.loss.item() == 0.0 and result.kl.shape == (0,)


@pytest.mark.parametrize("label", [-1, REAL, ROWS])
def test_a_label_outside_the_vocabulary_is_not_a_number_and_spoils_no_other(label: int) -> None:
    case = make_case(rows=ROWS)
    labels = labels_of(case)
    whole = reference(case, labels)[0]
    labels[3] = label
    result = prefix_cross_entropy(
        case.student_hidden, case.student_weight, labels, case.token_weight, vocab_size=REAL
    )
    assert bool(result.kl[3].isnan()) and bool(result.loss.isnan())
    keep = torch.arange(len(labels)) != 3
    assert relative_error(result.kl[keep], whole[keep]) < 2e-6


def test_inputs_that_do_not_fit_are_refused_with_both_numbers() -> None:
    case = make_case(rows=ROWS)
    labels = labels_of(case)
    with pytest.raises(ValueError, match="hidden size 20 and student_weight 24"):
        prefix_cross_entropy(
            case.student_hidden[:, :20],
            case.student_weight,
            labels,
            case.token_weight,
            vocab_size=REAL,
        )
    with pytest.raises(ValueError, match="labels must be int64"):
        prefix_cross_entropy(
            case.student_hidden,
            case.student_weight,
            labels.int(),
            case.token_weight,
            vocab_size=REAL,
        )
