"""The clipped log-ratio: against dense fp64 with the reward held fixed, and its two ends."""

import pytest
import torch

from megatron_prefix.loss import prefix_divergence, top_k_divergence
from tests.unit.loss.reference import dense, make_case, relative_error
from tests.unit.loss.test_divergences import run


@pytest.mark.parametrize("mixture", [0.02, 0.2, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("n, rows, vocab_size", [(37, 203, 203), (37, 203, 198), (1, 3, 2)])
def test_value_and_gradients(
    mixture: float, temperature: float, n: int, rows: int, vocab_size: int
) -> None:
    case = make_case(n, rows, seed=1)
    case.token_weight[0] = 0.25
    expected = dense(case, "relaxed_kl", vocab_size, mixture, temperature)
    result, dh, dw = run(
        case, "relaxed_kl", vocab_size, beta=mixture, temperature=temperature, chunk_size=10
    )
    assert relative_error(result.loss, expected.loss) < 1e-6
    assert relative_error(result.kl, expected.kl) < 1e-6
    assert relative_error(dh, expected.hidden_gradient) < 5e-6
    assert relative_error(dw, expected.weight_gradient) < 5e-6
    assert torch.count_nonzero(dw[vocab_size:]) == 0


def test_the_clip_takes_the_heavy_tail_and_nothing_else() -> None:
    case = make_case(64, 203)
    free, free_dh, _ = run(case, "reverse_kl", 203)
    clipped, dh, _ = run(case, "relaxed_kl", 203, beta=0.2)
    assert (clipped.kl <= free.kl + 1e-6).all() and clipped.kl.sum() < 0.9 * free.kl.sum()
    assert dh.norm() < free_dh.norm()
    nearly, nearly_dh, _ = run(case, "relaxed_kl", 203, beta=1e-9)
    assert relative_error(nearly.kl, free.kl.double()) < 1e-6
    assert relative_error(nearly_dh, free_dh.double()) < 5e-6


def test_a_student_close_to_its_teacher_is_clipped_nowhere_and_keeps_its_digits() -> None:
    case = make_case(200, 1003, spread=0.2)
    expected = dense(case, "reverse_kl", 1003)
    result, dh, dw = run(case, "relaxed_kl", 1003, beta=0.1)
    assert expected.kl.mean() < 0.05
    assert relative_error(result.kl, expected.kl) < 1e-6
    assert relative_error(dh, expected.hidden_gradient) < 5e-6
    assert relative_error(dw, expected.weight_gradient) < 5e-6


@pytest.mark.parametrize("spread", [60.0, 400.0])
def test_saturated_distributions_stay_finite_and_bounded(spread: float) -> None:
    case = make_case(64, 301, spread=spread)
    expected = dense(case, "relaxed_kl", 301, beta=0.2)
    result, dh, _ = run(case, "relaxed_kl", 301, beta=0.2)
    assert relative_error(result.kl, expected.kl) < 1e-5
    assert (result.kl <= torch.log(torch.tensor(4.0)) + 1e-5).all()  # ln((1 - 0.2) / 0.2)
    # One token has almost all probability, and its own clipped reward as mean: nothing is left.
    assert expected.hidden_gradient.norm() < 1e-6 and dh.norm() < 1e-6


def test_what_it_cannot_be_is_refused() -> None:
    case = make_case()
    for beta in (0.0, 0.51, float("nan")):
        with pytest.raises(ValueError, match=rf"beta={beta}, relaxed_kl's share"):
            prefix_divergence(*case.inputs, "relaxed_kl", beta, vocab_size=203)
    ids = torch.arange(2).repeat(37, 1)
    logprobs = torch.full((37, 2), -1.0)
    student = case.student_hidden, case.student_weight
    with pytest.raises(ValueError, match="needs a teacher that gives hidden states"):
        top_k_divergence(
            *student, ids, logprobs, case.token_weight, "relaxed_kl", 0.2, vocab_size=203
        )
