"""The ways to get the loss and both gradients that ``kl_loss.py`` compares, from their formulas."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.loss import Workspace, prefix_divergence, vocab_parallel_kl
from megatron_prefix.loss.task import CPU_LIMITS, chosen_chunk

D_STUDENT, D_TEACHER = 256, 384
BETA = 0.5
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


@dataclass(frozen=True)
class Inputs:
    """Logits of standard deviation 4.5 with a student near its teacher, as in training."""

    hidden: Tensor  # [N, d_s], wants a gradient
    weight: Tensor  # [V, d_s], wants a gradient
    teacher_hidden: Tensor  # [N, d_t]
    teacher_weight: Tensor  # [V, d_t]
    token_weight: Tensor  # [N]
    main_grad: Tensor  # [V, d_s]
    workspace: Workspace


def make_inputs(positions: int, vocabulary: int) -> Inputs:
    draw = torch.Generator().manual_seed(0)
    shared = torch.randn(positions, D_STUDENT, generator=draw)
    weight = torch.randn(vocabulary, D_STUDENT, generator=draw) * 4.5 / D_STUDENT**0.5
    teacher_hidden = torch.cat((shared, torch.randn(positions, 128, generator=draw)), 1)
    extra = torch.randn(vocabulary, D_TEACHER - D_STUDENT, generator=draw) * 0.06
    return Inputs(
        (shared + 0.1 * torch.randn(positions, D_STUDENT, generator=draw)).requires_grad_(),
        weight.clone().requires_grad_(),
        teacher_hidden,
        torch.cat((weight, extra), 1),
        torch.full((positions,), 1 / positions),
        torch.zeros(vocabulary, D_STUDENT),
        Workspace(),
    )


Method = Callable[[Inputs, str], Tensor]


def one_pass(inputs: Inputs, divergence: str) -> Tensor:
    heads = inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight
    loss, _ = vocab_parallel_kl(
        *heads, inputs.token_weight, divergence, BETA, vocab_size=inputs.weight.shape[0]
    )
    loss.backward()
    return loss


def in_training(inputs: Inputs, divergence: str) -> Tensor:
    """As under Megatron's DDP, where the weight's gradient has a place already."""
    inputs.weight.main_grad = inputs.main_grad
    heads = inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight
    settings = {"vocab_size": inputs.weight.shape[0], "workspace": inputs.workspace}
    result = prefix_divergence(*heads, inputs.token_weight, divergence, BETA, **settings)
    result.loss.backward()
    del inputs.weight.main_grad
    inputs.weight.grad = None  # zeros, for DDP's hook
    return result.loss


def full_logits(inputs: Inputs, divergence: str) -> Tensor:
    student = (inputs.hidden @ inputs.weight.T).log_softmax(-1)
    teacher = (inputs.teacher_hidden @ inputs.teacher_weight.T).log_softmax(-1)
    loss = (inputs.token_weight * from_logprobs(student, teacher, divergence)).sum()
    loss.backward()
    return loss


def from_logprobs(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """[N] from log-probabilities [N, V]."""
    if divergence == "reverse_kl":
        return (student.exp() * (student - teacher)).sum(-1)
    if divergence == "forward_kl":
        return (teacher.exp() * (teacher - student)).sum(-1)
    log_beta = torch.tensor(BETA, dtype=student.dtype).log()
    mixture = torch.logaddexp(teacher + log_beta, student + torch.log1p(-log_beta.exp()))
    to_teacher = (teacher.exp() * (teacher - mixture)).sum(-1)
    to_student = (student.exp() * (student - mixture)).sum(-1)
    return BETA * to_teacher + (1 - BETA) * to_student


class _SavedLogits(torch.autograd.Function):
    """Per-token all-reduces would go where ``all_reduce`` stands; one rank needs none."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher_logits: Tensor, divergence: str) -> Tensor:
        student = _log_softmax(logits.float())
        teacher = _log_softmax(teacher_logits.float())
        value = all_reduce(from_logprobs(student, teacher, divergence))
        ctx.divergence = divergence
        ctx.save_for_backward(student, teacher, value)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, value = ctx.saved_tensors
        p_s = student.exp()
        if ctx.divergence == "reverse_kl":
            gradient = p_s * (student - teacher - value[:, None])
        elif ctx.divergence == "forward_kl":
            gradient = p_s - teacher.exp()
        else:
            log_m = torch.logaddexp(teacher, student) - torch.tensor(2.0).log()
            ratio = student - log_m
            gradient = (1 - BETA) * p_s * (ratio - all_reduce((p_s * ratio).sum(-1))[:, None])
        return gradient * grad[:, None], None, None


def _log_softmax(logits: Tensor) -> Tensor:
    shifted = logits - all_reduce(logits.amax(-1))[:, None]
    return shifted - all_reduce(shifted.exp().sum(-1)).log()[:, None]


def all_reduce(per_token: Tensor) -> Tensor:
    return per_token


def saved_logits(inputs: Inputs, divergence: str) -> Tensor:
    logits = inputs.hidden @ inputs.weight.T
    teacher_logits = inputs.teacher_hidden @ inputs.teacher_weight.T
    value = _SavedLogits.apply(logits, teacher_logits, divergence)
    loss = (inputs.token_weight * value).sum()
    loss.backward()
    return loss


# The shares of the teacher that make Liger's JSD one of the others; it knows no divergence's name.
LIGER_BETA = {"reverse_kl": 1.0, "forward_kl": 0.0, "jsd": BETA}


def liger(inputs: Inputs, divergence: str) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    positions, vocabulary = inputs.hidden.shape[0], inputs.weight.shape[0]
    head = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=LIGER_BETA[divergence],
        compiled=False,
        chunk_size=chosen_chunk(positions, 2 * vocabulary, CPU_LIMITS),
    )
    labels = torch.zeros(positions, dtype=torch.int64)
    heads = inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight
    loss = head(*heads, labels)
    loss.backward()
    return loss


METHODS: dict[str, Method] = {
    "one_pass": one_pass,
    "in_training": in_training,
    "full_logits": full_logits,
    "saved_logits": saved_logits,
    "liger": liger,
}


def methods_for() -> list[str]:
    there = importlib.util.find_spec("liger_kernel") is not None
    return [name for name in METHODS if name != "liger" or there]


def forget_gradients(inputs: Inputs) -> None:
    """What an optimizer does once a step: no part of any method's time."""
    inputs.hidden.grad = inputs.weight.grad = None
    inputs.main_grad.zero_()


def run_fresh(method: str, inputs: Inputs, divergence: str) -> Tensor:
    forget_gradients(inputs)
    return METHODS[method](inputs, divergence)
