"""Vocabulary-parallel divergences in one pass, with the gradients made in the forward.

Legend: N prefix positions, C positions of a chunk, V rows of the (padded) vocabulary, R
tensor-parallel ranks, d_s and d_t the student's and the teacher's hidden size. Rank r holds rows
[r V/R, (r+1) V/R) of both LM heads; of these, rows below ``vocab_size`` are real.

Per chunk: two GEMMs make this rank's logits; five numbers a token are all-gathered; the student's
logits become their own gradient in place; two GEMMs make ``dh`` and add to ``dW``. Nothing of
size [N, V] exists and nothing is recomputed. With R > 1 two chunks are in flight, so that a
collective travels during the next chunk's GEMMs.

To read on: ``chunks`` is the whole forward, ``task`` the GEMMs and sums that it calls,
``divergence`` its mathematics; ``call`` refuses what does not fit, ``autograd`` hands out the
gradients.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prefix.loss.autograd import with_gradients
from megatron_prefix.loss.buffers import Workspace
from megatron_prefix.loss.call import Call, Student, layout_of
from megatron_prefix.loss.divergence import Divergence
from megatron_prefix.loss.overlap import TopKOverlap
from megatron_prefix.loss.task import Head, OneHot, TopK


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
    overlap: TopKOverlap | None = None,
) -> DivergenceResult:
    """Weighted sum over N prefix positions of a divergence over the whole vocabulary.

    ``student_hidden [N, d_s]``, ``student_weight [V/R, d_s]``, ``teacher_hidden [N, d_t]``,
    ``teacher_weight [V/R, d_t]``: fp32, bf16 or fp16, the hidden states the same on all ranks of
    ``tp_group`` (N too: 0 is fine, on all of them alike). ``token_weight`` fp32 [N].
    ``labels`` int64 [N]: also return the student's log-probabilities of these tokens.
    ``chunk_size``: positions whose logits exist at a time; None chooses. ``workspace``: memory for
    them, where the caller keeps it between calls. ``overlap`` is filled from both models' logits.
    ``temperature`` divides both models' logits; the loss is not multiplied by its square.

    Gradients: ``dh`` reaches ``student_hidden`` summed over the group once, or, with
    ``sequence_parallel``, as this rank's part, for the backward of the caller's gather to
    reduce-scatter. Where ``student_weight`` has a ``main_grad``, the weight gradient is added
    to it in fp32 *in the forward*: mask, 1/tokens, 1/microbatches and any loss scale must
    already be in ``token_weight``, and backward must reach the loss with a gradient of 1
    (Megatron: ``calculate_per_token_loss=True``), which is asserted. Autograd then gets zeros, so
    that DDP's hook fires and, with tied embeddings, adds the embedding's gradient alone.
    A graph can be run backward once.

    Raises ValueError for settings, shapes, dtypes, a ``main_grad`` or a vocabulary that do not
    fit, or differ over the group, and for whatever else a rank was given, before any other
    collective and with the same words on all ranks: they exchange eight bytes first. A non-finite
    input gives a non-finite loss; ``check_finite`` finds its position.
    """
    call = Call(
        Student(student_hidden, student_weight, token_weight, labels),
        Head(teacher_hidden, teacher_weight),
        Divergence(divergence, beta, temperature),
        layout_of(vocab_size, tp_group, sequence_parallel, chunk_size, workspace),
        overlap,
    )
    return DivergenceResult(*with_gradients(call))


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
    call = Call(
        Student(student_hidden, student_weight, token_weight, labels),
        TopK(teacher_ids, teacher_logprobs),
        Divergence(divergence, beta, temperature),
        layout_of(vocab_size, tp_group, sequence_parallel, chunk_size, workspace),
    )
    return DivergenceResult(*with_gradients(call))


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
    call = Call(
        Student(student_hidden, student_weight, token_weight, labels),
        OneHot(labels),
        Divergence("forward_kl", 0.5, 1.0),
        layout_of(vocab_size, tp_group, sequence_parallel, chunk_size, workspace),
    )
    return DivergenceResult(*with_gradients(call))
