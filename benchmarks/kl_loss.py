"""Time and memory of the vocab-parallel divergence on one CPU thread, fp32.

    python benchmarks/kl_loss.py [--quick] [--json FILE]

Each row is one way to get the loss and both of its gradients; ``over_gemms`` divides its CPU
seconds by those of the four matrix products that any exact one-pass method must do. Peak memory is
above the inputs, both gradients included. Errors are against fp64.

| method | what it is |
|---|---|
| gemms | the four matrix products alone, into memory that is there already: no loss |
| one_pass | megatron_prefix.loss |
| full_logits | whole logits, the divergence from log_softmax, autograd |
| saved_logits | a tensor-parallel loss as usual: an autograd function over whole fp32 logits that all-reduces maxima and sums a token and keeps what its backward needs |
| liger | liger_kernel.chunked_loss at the one_pass chunk, uncompiled, where it is installed |
"""

import argparse
import importlib.util
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_prefix.loss import vocab_parallel_kl

D_STUDENT, D_TEACHER = 256, 384
BETA = 0.5
QUICK_SIZES = ((1024, 8192), (128, 151936))
SIZES = ((1024, 8192), (2048, 8192), (1024, 32768), (128, 151936), (256, 151936))
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
ERRORS_UP_TO = 1 << 24  # logits; fp64 autograd on more needs gigabytes


@dataclass(frozen=True)
class Inputs:
    """Logits of standard deviation 4.5 with a student near its teacher, as in training."""

    hidden: Tensor  # [N, d_s], wants a gradient
    weight: Tensor  # [V, d_s], wants a gradient
    teacher_hidden: Tensor  # [N, d_t]
    teacher_weight: Tensor  # [V, d_t]
    token_weight: Tensor  # [N]


@dataclass(frozen=True)
class Row:
    positions: int
    vocabulary: int
    divergence: str
    method: str
    seconds: float
    over_gemms: float
    peak_mib: float
    value_error: float | None = None
    dh_error: float | None = None
    dw_error: float | None = None


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
    )


Method = Callable[[Inputs, str], Tensor]


def one_pass(inputs: Inputs, divergence: str) -> Tensor:
    heads = inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight
    loss, _ = vocab_parallel_kl(
        *heads, inputs.token_weight, divergence, BETA, vocab_size=inputs.weight.shape[0]
    )
    loss.backward()
    return loss


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
    def forward(ctx, logits: Tensor, teacher_logits: Tensor, divergence: str) -> Tensor:
        student = _log_softmax(logits.float())
        teacher = _log_softmax(teacher_logits.float())
        value = all_reduce(from_logprobs(student, teacher, divergence))
        ctx.divergence = divergence
        ctx.save_for_backward(student, teacher, value)
        return value

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
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


def liger(inputs: Inputs, divergence: str) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    assert divergence == "jsd"
    head = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=False, chunk_size=256
    )
    labels = torch.zeros(inputs.hidden.shape[0], dtype=torch.int64)
    heads = inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight
    loss = head(*heads, labels)
    loss.backward()
    return loss
