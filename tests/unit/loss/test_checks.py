"""What the loss refuses, with both numbers in one line."""

from dataclasses import replace

import pytest
import torch

from megatron_prefix.loss import check_finite, prefix_divergence
from tests.unit.loss.reference import Case, make_case

V = 203


def told(case: Case, **settings: object) -> str:
    arguments = {"vocab_size": V, **settings}
    with pytest.raises(ValueError) as error:
        prefix_divergence(*case.inputs, **arguments)  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "settings, parts",
    [
        ({"divergence": "kl"}, ["'kl'", "reverse_kl"]),
        ({"divergence": "jsd", "beta": 0.0}, ["beta=0.0", "between 0 and 1"]),
        ({"divergence": "jsd", "beta": 1.0}, ["beta=1.0", "between 0 and 1"]),
        ({"divergence": "jsd", "beta": float("nan")}, ["beta=nan"]),
        ({"temperature": 0.0}, ["temperature=0.0", "positive"]),
        ({"temperature": float("inf")}, ["temperature=inf", "finite"]),
        ({"chunk_size": 0}, ["chunk_size=0", "from 1"]),
        ({"vocab_size": V + 1}, ["vocab_size=204", "203"]),
        ({"vocab_size": 0}, ["vocab_size=0"]),
        ({"labels": torch.zeros(36, dtype=torch.int64)}, ["int64 [37]", "[36]"]),
        ({"labels": torch.zeros(37, dtype=torch.int32)}, ["int64 [37]", "int32"]),
    ],
)
def test_settings(settings: dict[str, object], parts: list[str]) -> None:
    message = told(make_case(), **settings)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "field, tensor, parts",
    [
        ("student_hidden", torch.zeros(37, 25), ["25", "24"]),
        ("student_hidden", torch.zeros(36, 24), ["36", "37"]),
        ("student_hidden", torch.zeros(1, 37, 24), ["[1, 37, 24]", "[N, d]"]),
        ("student_hidden", torch.zeros(37, 24).bfloat16(), ["bfloat16", "float32"]),
        ("student_weight", torch.zeros(202, 24), ["202", "203"]),
        ("teacher_weight", torch.zeros(203, 41), ["40", "41"]),
        ("teacher_weight", torch.zeros(203, 40).double(), ["float64", "float32"]),
        ("teacher_weight", torch.zeros(203, 40, device="meta"), ["meta", "cpu"]),
        ("token_weight", torch.zeros(36), ["[37]", "[36]"]),
        ("token_weight", torch.zeros(37).double(), ["float32", "float64"]),
    ],
)
def test_tensors(field: str, tensor: torch.Tensor, parts: list[str]) -> None:
    message = told(replace(make_case(), **{field: tensor}))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "main_grad, parts",
    [
        (torch.zeros(V, 25), ["[203, 24]", "[203, 25]"]),
        (torch.zeros(V, 24).double(), ["float32", "float64"]),
        (torch.zeros(V, 24, device="meta"), ["one device", "cpu, meta"]),
    ],
)
def test_main_grad(main_grad: torch.Tensor, parts: list[str]) -> None:
    case = make_case()
    case.student_weight.requires_grad_().main_grad = main_grad
    message = told(case)
    assert all(part in message for part in parts), message


def test_the_main_grad_of_a_frozen_head_is_left_alone() -> None:
    case = make_case()
    case.student_weight.main_grad = torch.zeros(1)
    assert prefix_divergence(*case.inputs, vocab_size=V).loss.isfinite()


def test_what_is_no_tensor() -> None:
    assert told(replace(make_case(), teacher_hidden=None)) == (
        "teacher_hidden must be a tensor, not NoneType"
    )


def test_beta_is_only_looked_at_where_it_means_something() -> None:
    case = make_case()
    result = prefix_divergence(*case.inputs, "reverse_kl", 0.0, vocab_size=V)
    assert result.loss.isfinite()


def test_a_non_finite_input_is_found_with_its_position() -> None:
    hidden = torch.zeros(5, 7)
    check_finite("student_hidden", hidden)
    hidden[3, 2], hidden[4, 1] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"student_hidden \[5, 7\] has 2 .*nan, is at \[3, 2\]"):
        check_finite("student_hidden", hidden)


def test_a_non_finite_input_gives_a_non_finite_loss() -> None:
    case = make_case()
    case.teacher_hidden[1, 1] = float("nan")
    result = prefix_divergence(*case.inputs, vocab_size=V)
    assert result.loss.isnan() and result.kl.isnan().nonzero().tolist() == [[1]]
