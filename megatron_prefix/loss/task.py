"""One call of the loss: its inputs, how it is cut into chunks, and what the chunks fill in.

Legend: N prefix positions, C positions of a chunk, V real vocabulary rows of this rank's shard,
R tensor-parallel ranks.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prefix.loss import gemm
from megatron_prefix.loss.agreement import Agreement
from megatron_prefix.loss.backends import kernels_for
from megatron_prefix.loss.buffers import Workspace
from megatron_prefix.loss.divergence import Divergence
from megatron_prefix.loss.kernels import Kernels, Logits
from megatron_prefix.loss.labels import label_columns, label_logprobs, one_hot_logits
from megatron_prefix.loss.overlap import TopKOverlap
from megatron_prefix.loss.relaxed import RelaxedRows
from megatron_prefix.loss.rows import FullRows, Rows
from megatron_prefix.loss.top_k import TopKRows


@dataclass(frozen=True)
class ChunkLimits:
    """Bounds on C. A short chunk pays for reading and writing the weights and dW once more; a
    long one only for memory."""

    buffer_bytes: int  # of all logits in memory
    shortest: int
    longest: int


CPU_LIMITS = ChunkLimits(buffer_bytes=64 << 20, shortest=128, longest=512)
GPU_LIMITS = ChunkLimits(buffer_bytes=1 << 30, shortest=2048, longest=4096)


def chosen_chunk(positions: int, logits: int, limits: ChunkLimits) -> int:
    """C for ``positions`` of ``logits`` each, those of all buffers in use together."""
    size = limits.buffer_bytes // (4 * max(logits, 1))
    size = min(max(size, limits.shortest), limits.longest)
    return max(1, math.ceil(positions / math.ceil(max(positions, 1) / size)))


@dataclass(frozen=True)
class Head:
    """A teacher whose whole distribution can be made."""

    hidden: Tensor  # [N, d_t]
    weight: Tensor  # [V/R, d_t]


@dataclass(frozen=True)
class TopK:
    """A teacher of whom no more is known."""

    ids: Tensor  # int64 [N, k]
    logprobs: Tensor  # fp32 [N, k]


@dataclass(frozen=True)
class OneHot:
    """A teacher that is sure of one token, so that KL(teacher||student) is the cross-entropy."""

    labels: Tensor  # int64 [N]


Teacher = Head | TopK | OneHot


@dataclass(frozen=True)
class Task:
    """Detached inputs, see the public functions of ``vocab_parallel``."""

    student_hidden: Tensor  # [N, d_s]
    student_weight: Tensor  # [V/R, d_s], padded rows included
    teacher: Teacher
    token_weight: Tensor  # fp32 [N]
    labels: Tensor | None  # int64 [N]
    divergence: Divergence
    vocab_size: int
    tp_group: ProcessGroup | None  # None: one rank
    agreement: Agreement | None  # to be confirmed before another collective
    chunk_size: int | None
    reduce_hidden_gradient: bool
    hidden_gradient: bool  # wanted
    weight_gradient: bool  # wanted
    main_grad: Tensor | None  # [V/R, d_s]
    workspace: Workspace
    overlap: TopKOverlap | None = None  # filled on the way, where a teacher's logits are made

    @property
    def rank(self) -> int:
        return 0 if self.tp_group is None else dist.get_rank(self.tp_group)

    @property
    def first_row(self) -> int:
        return self.rank * self.student_weight.shape[0]

    @property
    def real_rows(self) -> int:
        return min(max(self.vocab_size - self.first_row, 0), self.student_weight.shape[0])

    @property
    def chunks_in_flight(self) -> int:
        return 1 if self.tp_group is None else 2

    @property
    def buffers(self) -> int:
        """Of logits [C, V], for all chunks in flight: the student's, and a teacher's made here."""
        return self.chunks_in_flight * (1 if isinstance(self.teacher, TopK) else 2)

    @property
    def chunks(self) -> list[slice]:
        """Of nearly equal length, and the same on all ranks: real rows must not count here."""
        positions = self.student_hidden.shape[0]
        limits = GPU_LIMITS if self.student_hidden.is_cuda else CPU_LIMITS
        logits = self.student_weight.shape[0] * self.buffers
        size = self.chunk_size or chosen_chunk(positions, logits, limits)
        return [slice(at, min(at + size, positions)) for at in range(0, positions, size)]


@dataclass(frozen=True)
class Outcome:
    """Results on every rank; gradients None where they are not wanted or are in main_grad."""

    loss: Tensor  # fp32 scalar
    kl: Tensor  # fp32 [N]
    label_logprobs: Tensor | None  # fp32 [N]
    hidden_gradient: Tensor | None  # [N, d_s], the hidden states' dtype
    weight_gradient: Tensor | None  # fp32 [V/R, d_s]


@dataclass(frozen=True)
class Work:
    """A task under way: the real rows of the heads, and the results that its chunks fill in."""

    task: Task
    kernels: Kernels
    student_weight: Tensor  # [V, d_s]
    kl: Tensor  # fp64 [N]
    label_logprobs: Tensor  # fp32 [N], or [0] without labels
    hidden_gradient: Tensor | None  # [N, d_s]
    weight_gradient: Tensor | None  # fp32 [V/R, d_s], main_grad itself where that is fp32
    reductions: list[dist.Work] = field(default_factory=list)  # of the hidden gradient, under way

    def confirm_agreement(self) -> None:
        if self.task.agreement is not None:
            self.task.agreement.confirm()

    @property
    def differentiates(self) -> bool:
        return self.task.hidden_gradient or self.task.weight_gradient

    def student_logits(self, positions: slice, out: Tensor) -> None:
        gemm.logits_into(out, self.task.student_hidden[positions], self.student_weight)

    def rows(self, positions: slice, buffers: Sequence[Tensor]) -> Rows:
        """The chunk's, with the student's logits in the first of ``buffers``, fp32 [C, V]."""
        task, teacher = self.task, self.task.teacher
        if isinstance(teacher, TopK):
            targets = teacher.ids[positions], teacher.logprobs[positions]
            place = task.first_row, task.vocab_size
            return TopKRows(buffers[0], *targets, *place, task.divergence)
        student, made = buffers
        if isinstance(teacher, OneHot):
            place = task.first_row, task.vocab_size
            labels = teacher.labels[positions]
            fill_teacher = functools.partial(one_hot_logits, made, labels, *place)
        else:
            weight, hidden = teacher.weight[: task.real_rows], teacher.hidden[positions]
            fill_teacher = functools.partial(self._fill, positions, student, made, hidden, weight)
        logits = Logits(student, made, task.divergence, self.student_weight.dtype)
        if task.divergence.name == "relaxed_kl":
            return RelaxedRows(logits, fill_teacher, task.rank)
        return FullRows(self.kernels, logits, fill_teacher, task.rank)

    def _fill(
        self, positions: slice, student: Tensor, made: Tensor, hidden: Tensor, weight: Tensor
    ) -> None:
        """The teacher's logits into ``made``; both are raw then."""
        gemm.logits_into(made, hidden, weight)
        if self.task.overlap is not None:
            self.task.overlap.take(positions, student, made, self.task.first_row)

    def label_columns(self, positions: slice, logits: Tensor) -> Tensor:
        """What labels add to this rank's statistics, fp64 [C, 0 to 2], from raw ``logits``."""
        task = self.task
        if task.labels is None:
            return self.kl.new_empty((len(logits), 0))
        temperature = task.divergence.temperature
        return label_columns(logits, task.labels[positions], task.first_row, temperature)

    def set_label_logprobs(self, positions: slice, gathered: Tensor) -> None:
        """``gathered`` fp64 [R, C, >=6]: everyone's statistics with the label columns behind."""
        task = self.task
        if task.labels is not None:
            self.label_logprobs[positions] = label_logprobs(
                gathered, task.labels[positions], task.vocab_size, task.divergence.temperature
            )

    def backpropagate(self, positions: slice, logit_gradient: Tensor) -> None:
        """Both GEMMs of a chunk's logit gradient [C, V]; sends ``dh`` off to be summed."""
        task = self.task
        if self.hidden_gradient is not None:
            out = self.hidden_gradient[positions]
            gemm.hidden_gradient_into(out, logit_gradient, self.student_weight)
            if task.tp_group is not None and task.reduce_hidden_gradient:
                reduction = dist.all_reduce(out, group=task.tp_group, async_op=True)
                self.reductions.append(reduction)
        if self.weight_gradient is not None:
            total = self.weight_gradient[: task.real_rows]
            gemm.add_weight_gradient(total, logit_gradient, task.student_hidden[positions])

    def outcome(self) -> Outcome:
        for reduction in self.reductions:
            reduction.wait()
        task, weight_gradient = self.task, self.weight_gradient
        if weight_gradient is not None and task.main_grad is not None:
            if weight_gradient is not task.main_grad:
                task.main_grad.add_(weight_gradient)
            weight_gradient = None
        return Outcome(
            loss=(task.token_weight.double() * self.kl).sum().float(),
            kl=self.kl.float(),
            label_logprobs=None if task.labels is None else self.label_logprobs,
            hidden_gradient=self.hidden_gradient,
            weight_gradient=weight_gradient,
        )


def begin(task: Task) -> Work:
    positions = task.student_hidden.shape[0]
    real = slice(0, task.real_rows)
    return Work(
        task=task,
        kernels=kernels_for(task.student_hidden.device),
        student_weight=task.student_weight[real],
        kl=task.token_weight.new_empty(positions, dtype=torch.float64),
        label_logprobs=task.token_weight.new_empty(0 if task.labels is None else positions),
        hidden_gradient=torch.empty_like(task.student_hidden) if task.hidden_gradient else None,
        weight_gradient=_weight_accumulator(task),
    )


def _weight_accumulator(task: Task) -> Tensor | None:
    if not task.weight_gradient:
        return None
    if task.main_grad is not None and task.main_grad.dtype == torch.float32:
        return task.main_grad
    return torch.zeros_like(task.student_weight, dtype=torch.float32)
