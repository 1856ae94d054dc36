"""A teacher's top k and a tail, against the divergence of the coarsened distributions in fp64."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_prefix.loss import check_top_k_values, prefix_divergence, top_k_divergence
from tests.unit.loss.reference import Case, dense_divergence, make_case, relative_error

DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]


@dataclass(frozen=True)
class Targets:
    ids: Tensor  # [N, k]
    logprobs: Tensor  # fp32 [N, k]


def top_k_of(case: Case, k: int, vocab_size: int, temperature: float = 1.0) -> Targets:
    """In no order, as a server may give them."""
    logits = case.teacher_hidden.double() @ case.teacher_weight[:vocab_size].double().T
    logprobs, ids = (logits / temperature).log_softmax(-1).topk(k)
    return Targets(ids.flip(1), logprobs.flip(1).float())


@dataclass(frozen=True)
class Expected:
    kl: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor


def expected(
    case: Case,
    targets: Targets,
    divergence: str,
    vocab_size: int,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Expected:
    """Autograd in fp64 on k + 1 outcomes."""
    hidden = case.student_hidden.detach().double().requires_grad_()
    weight = case.student_weight.detach().double().requires_grad_()
    student = (hidden @ weight[:vocab_size].T / temperature).log_softmax(-1)
    outside = torch.ones_like(student, dtype=torch.bool).scatter(1, targets.ids, False)
    tail = student.masked_fill(~outside, -torch.inf).logsumexp(1, keepdim=True)
    log_p = torch.cat((student.gather(1, targets.ids), tail), 1)
    log_q = targets.logprobs.double()
    log_q = torch.cat((log_q, torch.log1p(-log_q.exp().sum(1, keepdim=True))), 1)
    kl = dense_divergence(log_p, log_q, divergence, beta)
    (case.token_weight.double() * kl).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return Expected(kl.detach(), hidden.grad, weight.grad)


def run(
    case: Case, targets: Targets, divergence: str, vocab_size: int, **settings: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of each token and both gradients."""
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone().requires_grad_()
    heads = hidden, weight, targets.ids, targets.logprobs, case.token_weight
    result = top_k_divergence(*heads, divergence, vocab_size=vocab_size, **settings)
    result.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert relative_error(result.loss, (result.kl.double() * case.token_weight).sum()) < 1e-6
    return result.kl, hidden.grad, weight.grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("k, vocab_size", [(1, 203), (16, 198), (100, 203)])
def test_values_and_gradients(divergence: str, temperature: float, k: int, vocab_size: int) -> None:
    case = make_case()
    targets = top_k_of(case, k, vocab_size, temperature)
    settings = {"beta": 0.3, "temperature": temperature}
    reference = expected(case, targets, divergence, vocab_size, **settings)
    kl, dh, dw = run(case, targets, divergence, vocab_size, chunk_size=10, **settings)
    assert relative_error(kl, reference.kl) < 1e-6
    assert relative_error(dh, reference.hidden_gradient) < 5e-6
    assert relative_error(dw, reference.weight_gradient) < 5e-6
    assert torch.count_nonzero(dw[vocab_size:]) == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_tail_of_one_token_gives_the_divergence_over_the_whole_vocabulary(
    divergence: str,
) -> None:
    case = make_case(rows=32, spread=1.0)
    kl, dh, dw = run(case, top_k_of(case, 31, 32), divergence, 32)
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone().requires_grad_()
    whole = prefix_divergence(hidden, weight, *case.inputs[2:], divergence, vocab_size=32)
    whole.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert relative_error(kl, whole.kl.double()) < 1e-5
    assert relative_error(dh, hidden.grad.double()) < 1e-5
    assert relative_error(dw, weight.grad.double()) < 1e-5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_what_the_tail_hides_is_divergence(divergence: str) -> None:
    case = make_case()
    whole = prefix_divergence(*case.inputs, divergence, vocab_size=203).kl
    few, many = (run(case, top_k_of(case, k, 203), divergence, 203)[0] for k in (4, 64))
    assert (few < many).all() and (many < whole).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("spread", [60.0, 400.0])
def test_a_tail_that_no_exponential_holds(divergence: str, spread: float) -> None:
    """A student all of whose mass is on a top token, or all in the tail: exp underflows."""
    case = make_case(64, 301, spread=spread)
    even = torch.full((64, 8), 0.1).log()
    targets = Targets(top_k_of(case, 8, 301).ids, even)
    reference = expected(case, targets, divergence, 301, 0.2)
    kl, dh, dw = run(case, targets, divergence, 301, beta=0.2)
    assert relative_error(kl, reference.kl) < 1e-6
    for gradient, wanted in ((dh, reference.hidden_gradient), (dw, reference.weight_gradient)):
        # At 400 a gradient of nought is the difference of fp64 numbers of size 1000.
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm() + 1e-11


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_teacher_sure_of_its_top_tokens_keeps_the_divergence_finite(divergence: str) -> None:
    """Log-probabilities that sum to 1, or by rounding to more: the tail has 2**-23."""
    case = make_case(2)
    case.token_weight.fill_(0.5)
    logprobs = torch.tensor([[0.5, 0.5], [0.5, 0.5 + 1e-7]]).log()
    kl, dh, _ = run(case, Targets(torch.tensor([[3, 9], [4, 1]]), logprobs), divergence, 203)
    assert kl.isfinite().all() and (kl > 0.1).all() and dh.isfinite().all()


def test_a_top_token_without_any_probability_counts_for_nothing_in_forward_kl() -> None:
    case = make_case(1)
    given = top_k_of(case, 3, 203)
    logprobs = torch.cat((given.logprobs, torch.full((1, 1), -torch.inf)), 1)
    unlikely = next(token for token in range(203) if token not in given.ids)
    ids = torch.cat((given.ids, torch.tensor([[unlikely]])), 1)
    kl, dh, _ = run(case, Targets(ids, logprobs), "forward_kl", 203)
    assert kl.isfinite().all() and dh.isfinite().all()
    heads = *case.inputs[:2], ids, logprobs, case.token_weight
    assert top_k_divergence(*heads, "reverse_kl", vocab_size=203).kl.isposinf().all()


def test_label_logprobs_are_those_of_the_whole_vocabulary() -> None:
    case, labels = make_case(23, 131), torch.arange(23) * 5
    targets = top_k_of(case, 7, 127, 2.0)
    heads = *case.inputs[:2], targets.ids, targets.logprobs, case.token_weight
    settings = {"temperature": 2.0, "chunk_size": 6, "labels": labels}
    result = top_k_divergence(*heads, vocab_size=127, **settings)
    logits = case.student_hidden.double() @ case.student_weight[:127].double().T
    exact = logits.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    assert result.label_logprobs is not None
    assert relative_error(result.label_logprobs, exact) < 1e-6


def test_the_chunk_does_not_matter() -> None:
    case = make_case(100)
    targets = top_k_of(case, 9, 203)
    whole = run(case, targets, "jsd", 203, chunk_size=100)
    for chunk_size in (None, 1, 33):
        for got, reference in zip(
            run(case, targets, "jsd", 203, chunk_size=chunk_size), whole, strict=True
        ):
            assert relative_error(got, reference.double()) < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("foreign", [-1, 203])
def test_an_id_outside_the_vocabulary_makes_its_token_nan(divergence: str, foreign: int) -> None:
    case = make_case(3)
    targets = top_k_of(case, 4, 203)
    targets.ids[1, 2] = foreign
    heads = *case.inputs[:2], targets.ids, targets.logprobs, case.token_weight
    kl = top_k_divergence(*heads, divergence, vocab_size=203).kl
    assert kl.isfinite().tolist() == [True, False, True]


def test_no_position_at_all() -> None:
    case = make_case(0)
    kl, dh, dw = run(case, top_k_of(case, 4, 203), "jsd", 203)
    assert kl.shape == (0,) and dh.shape == (0, 24) and torch.count_nonzero(dw) == 0


@pytest.mark.parametrize(
    "ids, logprobs, parts",
    [
        (torch.zeros(36, 4, dtype=torch.int64), torch.zeros(36, 4), ["[37, k]", "[36, 4]"]),
        (torch.zeros(37, dtype=torch.int64), torch.zeros(37), ["[37, k]", "[37]"]),
        (torch.zeros(37, 4), torch.zeros(37, 4), ["int64", "float32"]),
        (torch.zeros(37, 4, dtype=torch.int64), torch.zeros(37, 5), ["[37, 4]", "[37, 5]"]),
        (torch.zeros(37, 4, dtype=torch.int64), torch.zeros(37, 4).half(), ["float16"]),
        (torch.zeros(37, 203, dtype=torch.int64), torch.zeros(37, 203), ["k=203", "203"]),
        (torch.zeros(37, 0, dtype=torch.int64), torch.zeros(37, 0), ["k=0"]),
        (torch.zeros(37, 4, dtype=torch.int64), torch.zeros(37, 4, device="meta"), ["meta"]),
    ],
)
def test_targets_that_do_not_fit(ids: Tensor, logprobs: Tensor, parts: list[str]) -> None:
    case = make_case()
    with pytest.raises(ValueError) as error:
        top_k_divergence(*case.inputs[:2], ids, logprobs, case.token_weight, vocab_size=203)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize(
    "row, logprobs, message",
    [
        ([1, 203], [-1.0, -1.0], "203 is an id outside the vocabulary of 203, at position 1"),
        ([1, -2], [-1.0, -1.0], "-2 is an id outside"),
        ([7, 7], [-1.0, -1.0], "7 is an id twice in a row, at position 1"),
        ([1, 2], [-1.0, 0.5], "0.5 is no log-probability, at position 1"),
        ([1, 2], [-1.0, float("nan")], "nan is no log-probability"),
        ([1, 2], [-0.1, -0.1], "is more than a sum of probabilities, at position 1"),
    ],
)
def test_values_that_no_teacher_has(row: list[int], logprobs: list[float], message: str) -> None:
    good = [3, 0], [-0.5, -2.0]
    with pytest.raises(ValueError, match=message):
        check_top_k_values(torch.tensor([good[0], row]), torch.tensor([good[1], logprobs]), 203)
    check_top_k_values(torch.tensor([good[0]]), torch.tensor([good[1]]), 203)
