"""Where the gradients that the forward made are handed to autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_prefix.loss.buffers import zeros_never_read
from megatron_prefix.loss.call import Call
from megatron_prefix.loss.chunks import run_chunks
from megatron_prefix.loss.task import Task


def with_gradients(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """The loss, differentiable; ``kl`` and, where there are labels, their log-probabilities."""
    hidden, weight, task = call.student.hidden, call.student.weight, call.task()
    result = _GradientInForward.apply(hidden, weight, task)
    if task.weight_gradient and task.main_grad is not None:
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return result


class _GradientInForward(torch.autograd.Function):
    """Makes both gradients in the forward and hands them out in the backward."""

    @staticmethod
    def forward(
        ctx: Any, student_hidden: Tensor, student_weight: Tensor, task: Task
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        outcome = run_chunks(task)
        ctx.gradients = (outcome.hidden_gradient, outcome.weight_gradient)
        ctx.weight_like = student_weight.new_empty(()).expand(student_weight.shape)
        ctx.needs_unit_gradient = task.weight_gradient and task.main_grad is not None
        ctx.mark_non_differentiable(outcome.kl)
        if outcome.label_logprobs is not None:
            ctx.mark_non_differentiable(outcome.label_logprobs)
        ctx.set_materialize_grads(False)
        return outcome.loss, outcome.kl, outcome.label_logprobs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_loss: Tensor | None, *_: None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        if grad_loss is None:
            return None, None, None
        if ctx.gradients is None:
            raise RuntimeError(
                "this loss was already run backward; call it again instead of retain_graph=True"
            )
        hidden_gradient, weight_gradient = ctx.gradients
        ctx.gradients = None
        # A CPU need not walk over the gradients for a factor of 1; a GPU must not be waited for.
        unit = grad_loss.device.type == "cpu" and grad_loss.item() == 1
        if hidden_gradient is not None and not unit:
            hidden_gradient.mul_(grad_loss)
        if ctx.needs_unit_gradient:
            # No read-back: on a GPU this asserts on the device, without waiting for it.
            torch._assert_async(
                grad_loss == 1,
                "with main_grad the gradient of the loss must be 1; fold any scale",
            )
            weight_gradient = zeros_never_read(ctx.weight_like)
        elif weight_gradient is not None:
            scaled = weight_gradient if unit else weight_gradient.mul_(grad_loss)
            weight_gradient = scaled.to(ctx.weight_like.dtype)
        return hidden_gradient, weight_gradient, None
