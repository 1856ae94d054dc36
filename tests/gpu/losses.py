"""The loss on a device against dense fp64, for the GPU tests; a CPU runs it in the unit tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prefix.loss import Workspace, prefix_divergence, top_k_divergence
from tests.unit.loss.reference import Case, dense, relative_error

BETA = 0.3
CHUNK = 128


@dataclass(frozen=True)
class Errors:
    """Norms of differences over norms, against dense fp64 on the CPU."""

    kl: float
    hidden_gradient: float
    weight_gradient: float  # in main_grad


def on(case: Case, device: torch.device) -> Case:
    return Case(*(tensor.to(device) for tensor in case.inputs))


def with_main_grad(weight: Tensor) -> Tensor:
    leaf = weight.clone().requires_grad_()
    leaf.main_grad = torch.zeros(  # type: ignore[attr-defined]
        weight.shape, device=weight.device, dtype=torch.float32
    )
    return leaf


def errors(
    case: Case, divergence: str, vocab_size: int, temperature: float, device: torch.device
) -> Errors:
    expected = dense(case, divergence, vocab_size, BETA, temperature)
    there = on(case, device)
    hidden, weight = there.student_hidden.requires_grad_(), with_main_grad(there.student_weight)
    settings = {"vocab_size": vocab_size, "chunk_size": CHUNK, "workspace": Workspace()}
    heads = hidden, weight, *there.inputs[2:]
    result = prefix_divergence(*heads, divergence, BETA, temperature, **settings)
    result.loss.backward()
    assert hidden.grad is not None
    return Errors(
        relative_error(result.kl.cpu(), expected.kl),
        relative_error(hidden.grad.cpu(), expected.hidden_gradient),
        relative_error(weight.main_grad.cpu(), expected.weight_gradient),  # type: ignore[attr-defined]
    )


def top_k_loss(case: Case, divergence: str, vocab_size: int, device: torch.device) -> Tensor:
    """The divergence of each token from the teacher's 16 likeliest (found on the CPU)."""
    teacher = case.teacher_hidden.float() @ case.teacher_weight[:vocab_size].float().T
    logprobs, ids = (each.to(device) for each in teacher.log_softmax(-1).topk(16))
    there = on(case, device)
    hidden, weight = there.student_hidden.requires_grad_(), with_main_grad(there.student_weight)
    heads = hidden, weight, ids, logprobs, there.token_weight
    result = top_k_divergence(*heads, divergence, vocab_size=vocab_size, chunk_size=CHUNK)
    result.loss.backward()
    return result.kl.cpu()


def run_once(case: Case, divergence: str, vocab_size: int, device: torch.device) -> None:
    """Forward and backward as in training, with nothing of the result looked at."""
    there = on(case, device)
    hidden, weight = there.student_hidden.requires_grad_(), with_main_grad(there.student_weight)
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=device)
    settings = {"vocab_size": vocab_size, "chunk_size": CHUNK, "labels": labels}
    heads = hidden, weight, *there.inputs[2:]
    prefix_divergence(*heads, divergence, BETA, 1.5, **settings).loss.backward()
