"""The errors that ``kl_loss.py`` reports."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks._kl_methods import BETA, Inputs, from_logprobs, full_logits, run_fresh
from megatron_prefix.loss import vocab_parallel_kl
from tests.distributed.ranks import run_ranks
from tests.unit.loss.reference import Case, dense, make_case, relative_error

POSITIONS, VOCABULARY = 256, 4096


@dataclass(frozen=True)
class Exactness:
    """Norms of differences over norms. Random student and teacher, logits of ``spread``."""

    divergence: str
    method: str
    ranks: int
    spread: float  # 30: saturated
    value: float
    dh: float
    dw: float
    against: str


def error_rows(divergence: str, spread: float) -> list[Exactness]:
    """One rank, and whole logits in fp32, against dense fp64 autograd."""
    case = _case(spread)
    reference = dense(case, divergence, VOCABULARY, BETA)
    expected = reference.kl, reference.hidden_gradient, reference.weight_gradient
    return [
        _row(divergence, 1, spread, method, "fp64", got, expected)
        for method, got in (
            ("one_pass", _gradients(case, divergence)),
            ("full_logits", _dense_gradients(case, divergence)),
        )
    ]


def tensor_parallel_row(divergence: str, ranks: int) -> Exactness:
    """Ranks of gloo against one rank."""
    case = _case(2.0)
    alone = _gradients(case, divergence)
    parts = run_ranks(ranks, _gradients, case, divergence)
    got = parts[0][0], parts[0][1], torch.cat([part[2] for part in parts])
    return _row(divergence, ranks, 2.0, "one_pass", "1 rank", got, alone)


def _row(
    divergence: str,
    ranks: int,
    spread: float,
    method: str,
    against: str,
    got: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> Exactness:
    pairs = zip(got, expected, strict=True)
    value, dh, dw = (relative_error(one, other.double()) for one, other in pairs)
    return Exactness(divergence, method, ranks, spread, value, dh, dw, against)


def _case(spread: float) -> Case:
    return make_case(POSITIONS, VOCABULARY, 64, 96, spread)


def _gradients(case: Case, divergence: str) -> tuple[Tensor, Tensor, Tensor]:
    """Values [N], dh, and this rank's rows of dW."""
    hidden, weight, group = case.student_hidden.clone().requires_grad_(), case.student_weight, None
    if dist.is_initialized():
        group = dist.group.WORLD
        rank, ranks = dist.get_rank(), dist.get_world_size()
        case = replace(case, teacher_weight=case.teacher_weight.chunk(ranks)[rank])
        weight = weight.chunk(ranks)[rank]
    weight = weight.clone().requires_grad_()
    settings = {"vocab_size": VOCABULARY, "tp_group": group, "chunk_size": 100}
    loss, kl = vocab_parallel_kl(hidden, weight, *case.inputs[2:], divergence, BETA, **settings)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return kl, hidden.grad, weight.grad


def _dense_gradients(case: Case, divergence: str) -> tuple[Tensor, Tensor, Tensor]:
    hidden = case.student_hidden.clone().requires_grad_()
    weight = case.student_weight.clone().requires_grad_()
    student = (hidden @ weight.T).log_softmax(-1)
    teacher = (case.teacher_hidden @ case.teacher_weight.T).log_softmax(-1)
    values = from_logprobs(student, teacher, divergence)
    (case.token_weight * values).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return values, hidden.grad, weight.grad


@dataclass(frozen=True)
class Exact:
    """On the benchmark's own inputs, by fp64 autograd."""

    loss: Tensor
    hidden_gradient: Tensor
    weight_gradient: Tensor

    @classmethod
    def of(cls, inputs: Inputs, divergence: str) -> "Exact":
        hidden = inputs.hidden.detach().double().requires_grad_()
        weight = inputs.weight.detach().double().requires_grad_()
        wide = replace(
            inputs,
            hidden=hidden,
            weight=weight,
            teacher_hidden=inputs.teacher_hidden.double(),
            teacher_weight=inputs.teacher_weight.double(),
            token_weight=inputs.token_weight.double(),
        )
        loss = full_logits(wide, divergence).detach()
        assert hidden.grad is not None and weight.grad is not None
        return cls(loss, hidden.grad, weight.grad)

    def errors(self, inputs: Inputs, divergence: str, method: str) -> tuple[float, float, float]:
        """Of the loss, dh and dW."""
        loss = run_fresh(method, inputs, divergence)
        dw = inputs.main_grad if inputs.weight.grad is None else inputs.weight.grad
        assert inputs.hidden.grad is not None
        return (
            relative_error(loss, self.loss),
            relative_error(inputs.hidden.grad, self.hidden_gradient),
            relative_error(dw, self.weight_gradient),
        )
