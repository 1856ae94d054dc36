"""Vocabulary-parallel divergences in one pass, with the gradients made in the forward.

Legend: N prefix positions, C positions of a chunk, V rows of the (padded) vocabulary, R
tensor-parallel ranks, d_s and d_t the student's and the teacher's hidden size. Rank r holds rows
[r V/R, (r+1) V/R) of both LM heads; of these, rows below ``vocab_size`` are real.

Per chunk: two GEMMs make this rank's logits; five numbers a token are all-gathered; the student's
logits become their own gradient in place; two GEMMs make ``dh`` and add to ``dW``. Nothing of
size [N, V] exists and nothing is recomputed. With R > 1 two chunks are in flight, so that a
collective travels during the next chunk's GEMMs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_prefix.loss import checks
from megatron_prefix.loss.agreement import Agreement
from megatron_prefix.loss.buffers import Workspace, zeros_never_read
from megatron_prefix.loss.chunks import run_chunks
from megatron_prefix.loss.divergence import Divergence
from megatron_prefix.loss.task import Head, OneHot, Task, Teacher, TopK


@dataclass(frozen=True)
class DivergenceResult:
    """The same on all ranks of the tensor-parallel group."""

    loss: Tensor  # fp32 scalar, sum of token_weight * kl; differentiable
    kl: Tensor  # fp32 [N], detached, unweighted
    label_logprobs: Tensor | None  # fp32 [N], detached, at temperature 1; NaN off the vocabulary


def vocab_parallel_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weight: Tensor,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    *,
    vocab_size: int,
    tp_group: ProcessGroup | None = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss (fp32 scalar) and divergence of each token (fp32 [N], detached).

    As :func:`prefix_divergence`, without labels.
    """
    result = prefix_divergence(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        token_weight,
        divergence,
        beta,
        temperature,
        vocab_size=vocab_size,
        tp_group=tp_group,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
    )
    return result.loss, result.kl


def prefix_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weight: Tensor,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    *,
    vocab_size: int,
    tp_group: ProcessGroup | None = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    labels: Tensor | None = None,
    workspace: Workspace | None = None,
) -> DivergenceResult:
    """Weighted sum over N prefix positions of a divergence over the whole vocabulary.

    ``student_hidden [N, d_s]``, ``student_weight [V/R, d_s]``, ``teacher_hidden [N, d_t]``,
    ``teacher_weight [V/R, d_t]``: fp32, bf16 or fp16, the hidden states the same on all ranks of
    ``tp_group`` (N too: 0 is fine, on all of them alike). ``token_weight`` fp32 [N].
    ``labels`` int64 [N]: also return the student's log-probabilities of these tokens.
    ``chunk_size``: positions whose logits exist at a time; None chooses. ``workspace``: memory for
    them, where the caller keeps it between calls. ``temperature`` divides
    both models' logits; the loss is not multiplied by its square.

    Gradients: ``dh`` reaches ``student_hidden`` summed over the group once, or, with
    ``sequence_parallel``, as this rank's part, for the backward of the caller's gather to
    reduce-scatter. Where ``student_weight`` has a ``main_grad``, the weight gradient is added
    to it in fp32 *in the forward*: mask, 1/tokens, 1/microbatches and any loss scale must
    already be in ``token_weight``, and backward must reach the loss with a gradient of 1
    (Megatron: ``calculate_per_token_loss=True``), which is asserted. Autograd then gets zeros, so
    that DDP's hook fires and, with tied embeddings, adds the embedding's gradient alone.
    A graph can be run backward once.

    Raises ValueError for settings, shapes, dtypes or a vocabulary that do not fit, or differ over
    the group, before any other collective and with the same words on all ranks: they exchange
    eight bytes first. A non-finite input gives a non-finite loss; ``check_finite`` finds its
    position.
    """
    call = _Call(
        student_hidden=student_hidden,
        student_weight=student_weight,
        token_weight=token_weight,
        labels=labels,
        divergence=Divergence(divergence, beta, temperature),
        vocab_size=vocab_size,
        tp_group=None if tp_group is None or tp_group.size() == 1 else tp_group,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        workspace=workspace or Workspace(huge_pages=False),
    )
    return _run(call, Head(teacher_hidden.detach(), teacher_weight.detach()))


def top_k_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_ids: Tensor,
    teacher_logprobs: Tensor,
    token_weight: Tensor,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    *,
    vocab_size: int,
    tp_group: ProcessGroup | None = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    labels: Tensor | None = None,
    workspace: Workspace | None = None,
) -> DivergenceResult:
    """As :func:`prefix_divergence`, for a teacher that gives its k likeliest tokens and no more.

    ``teacher_ids`` int64 [N, k], distinct in a row, ``teacher_logprobs`` fp32 [N, k], the same on
    all ranks: log-probabilities over the *whole* vocabulary, of the teacher *at this
    temperature*, which here divides the student's logits alone. They need no order.

    Computed is the divergence between the two distributions over k + 1 outcomes: the k tokens,
    each by itself, and the tail, all other tokens of the vocabulary as one. The teacher's tail has
    the probability 1 - sum exp(logprobs), taken as 2**-23 at least (fp32 log-probabilities tell
    no less); the student's is summed over its whole distribution. By the log-sum inequality this
    is at most the divergence over the whole vocabulary, and equal where the two share the tail's
    conditional distribution, or where k is V - 1. What the student does *within* the tail gets no
    gradient: the tail's tokens move together, in proportion to their probabilities.

    A token with an id outside the vocabulary gets NaN; ``check_top_k_values`` finds it.
    """
    call = _Call(
        student_hidden=student_hidden,
        student_weight=student_weight,
        token_weight=token_weight,
        labels=labels,
        divergence=Divergence(divergence, beta, temperature),
        vocab_size=vocab_size,
        tp_group=None if tp_group is None or tp_group.size() == 1 else tp_group,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        workspace=workspace or Workspace(huge_pages=False),
    )
    return _run(call, TopK(teacher_ids, teacher_logprobs.detach()))


def prefix_cross_entropy(
    student_hidden: Tensor,
    student_weight: Tensor,
    labels: Tensor,
    token_weight: Tensor,
    *,
    vocab_size: int,
    tp_group: ProcessGroup | None = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    workspace: Workspace | None = None,
) -> DivergenceResult:
    """Weighted sum over N prefix positions of -ln p(label), at temperature 1.

    As :func:`prefix_divergence` with ``forward_kl``, to a teacher that is sure of the ``labels``,
    int64 [N]: its logits are written instead of multiplied out. ``kl`` of the result is the
    cross-entropy of each token; a label outside the vocabulary makes it NaN.
    """
    call = _Call(
        student_hidden=student_hidden,
        student_weight=student_weight,
        token_weight=token_weight,
        labels=labels,
        divergence=Divergence("forward_kl", 0.5, 1.0),
        vocab_size=vocab_size,
        tp_group=None if tp_group is None or tp_group.size() == 1 else tp_group,
        chunk_size=chunk_size,
        sequence_parallel=sequence_parallel,
        workspace=workspace or Workspace(huge_pages=False),
    )
    return _run(call, OneHot(labels))


@dataclass(frozen=True)
class _Call:
    """The arguments that all kinds of teacher share; ``tp_group`` None for one rank."""

    student_hidden: Tensor
    student_weight: Tensor
    token_weight: Tensor
    labels: Tensor | None
    divergence: Divergence
    vocab_size: int
    tp_group: ProcessGroup | None
    chunk_size: int | None
    sequence_parallel: bool
    workspace: Workspace

    def wants_gradient(self, tensor: Tensor) -> bool:
        return torch.is_grad_enabled() and tensor.requires_grad

    def check(self, teacher: Teacher) -> None:
        """ValueError for what does not fit on this rank by itself."""
        checks.check_settings(self.divergence, self.chunk_size)
        if isinstance(teacher, Head):
            heads = self.student_hidden, self.student_weight, teacher.hidden, teacher.weight
            checks.check_heads(*heads)
        else:
            checks.check_head("student", self.student_hidden, self.student_weight)
        if isinstance(teacher, TopK):
            targets = teacher.ids, teacher.logprobs
            checks.check_top_k(self.student_hidden, *targets, self.vocab_size)
        checks.check_tokens(self.student_hidden, self.token_weight, self.labels)
        checks.check_vocabulary(self.vocab_size, self.student_weight.shape[0], self.tp_group)

    def agree(self, teacher: Teacher) -> Agreement | None:
        """Raises what ``check`` does, over ranks on all of them alike."""
        if self.tp_group is None:
            self.check(teacher)
            return None
        facts, refusal = self.facts(teacher), None
        try:
            self.check(teacher)
        except ValueError as error:
            refusal = error
        agreement = Agreement(facts, refusal, self.tp_group, self.student_hidden.device)
        if refusal is not None:
            agreement.confirm()
        return agreement

    def facts(self, teacher: Teacher) -> dict[str, object]:
        """What decides which collectives follow, and of what sizes."""
        tensors = {
            "student_hidden": self.student_hidden,
            "student_weight": self.student_weight,
            "token_weight": self.token_weight,
            "labels": self.labels,
            **{f"teacher_{name}": tensor for name, tensor in vars(teacher).items()},
        }
        return {name: _kind(tensor) for name, tensor in tensors.items()} | {
            "vocab_size": self.vocab_size,
            "divergence": self.divergence,
            "chunk_size": self.chunk_size,
            "sequence_parallel": self.sequence_parallel,
            "a gradient to student_hidden": self.wants_gradient(self.student_hidden),
        }


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _run(call: _Call, teacher: Teacher) -> DivergenceResult:
    hidden, weight = call.student_hidden, call.student_weight
    task = Task(
        student_hidden=hidden.detach(),
        student_weight=weight.detach(),
        teacher=teacher,
        token_weight=call.token_weight.detach(),
        labels=call.labels,
        divergence=call.divergence,
        vocab_size=call.vocab_size,
        tp_group=call.tp_group,
        agreement=call.agree(teacher),
        chunk_size=call.chunk_size,
        reduce_hidden_gradient=not call.sequence_parallel,
        hidden_gradient=call.wants_gradient(hidden),
        weight_gradient=call.wants_gradient(weight),
        main_grad=getattr(weight, "main_grad", None),
        workspace=call.workspace,
    )
    result = DivergenceResult(*_GradientInForward.apply(hidden, weight, task))
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
