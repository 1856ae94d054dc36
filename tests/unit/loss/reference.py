"""Dense fp64 references: whole logits, autograd, no chunk, no shard."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Inputs as the loss takes them, over the whole (padded) vocabulary."""

    student_hidden: Tensor  # [N, d_s]
    student_weight: Tensor  # [V, d_s]
    teacher_hidden: Tensor  # [N, d_t]
    teacher_weight: Tensor  # [V, d_t]
    token_weight: Tensor  # fp32 [N]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (
            self.student_hidden,
            self.student_weight,
            self.teacher_hidden,
            self.teacher_weight,
            self.token_weight,
        )


def make_case(
    n: int = 37,
    rows: int = 203,
    d_s: int = 24,
    d_t: int = 40,
    spread: float = 2.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Logits of standard deviation ``spread``; every fifth token has weight 0."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    weight = torch.rand(n, generator=draw) / max(n, 1)
    weight[::5] = 0.0
    return Case(
        normal(n, d_s).to(dtype),
        (normal(rows, d_s) * spread / d_s**0.5).to(dtype),
        normal(n, d_t).to(dtype),
        (normal(rows, d_t) * spread / d_t**0.5).to(dtype),
        weight,
    )


@dataclass(frozen=True)
class Dense:
    loss: Tensor
    kl: Tensor  # [N]
    hidden_gradient: Tensor  # [N, d_s]
    weight_gradient: Tensor  # [V, d_s], 0 in padded rows


def dense(
    case: Case, divergence: str, vocab_size: int, beta: float = 0.5, temperature: float = 1.0
) -> Dense:
    hidden = case.student_hidden.detach().double().requires_grad_()
    weight = case.student_weight.detach().double().requires_grad_()
    student = (hidden @ weight[:vocab_size].T / temperature).log_softmax(-1)
    teacher_logits = case.teacher_hidden.double() @ case.teacher_weight[:vocab_size].double().T
    teacher = (teacher_logits / temperature).log_softmax(-1)
    kl = dense_divergence(student, teacher, divergence, beta)
    loss = (case.token_weight.double() * kl).sum()
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    return Dense(loss.detach(), kl.detach(), hidden.grad, weight.grad)


def dense_divergence(student: Tensor, teacher: Tensor, divergence: str, beta: float) -> Tensor:
    """From log-probabilities [N, V], by the definitions."""
    if divergence == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(-1)
    if divergence == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    if divergence == "relaxed_kl":  # beta is lambda; no gradient through the reward
        floor = torch.log(torch.tensor(beta / (1 - beta)).double())
        reward = (teacher - student).detach().clamp(min=floor)
        return -(student.exp() * reward).sum(-1)
    log_m = torch.logaddexp(
        teacher + torch.log(torch.tensor(beta).double()),
        student + torch.log1p(-torch.tensor(beta).double()),
    )
    to_teacher = (teacher.exp() * (teacher - log_m)).sum(-1)
    to_student = (student.exp() * (student - log_m)).sum(-1)
    return beta * to_teacher + (1 - beta) * to_student


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    difference = value.detach().double() - reference
    return float(difference.norm() / reference.norm().clamp_min(1e-300))
