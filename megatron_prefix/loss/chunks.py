"""The walk over the chunks: buffers, GEMMs, collectives in flight.

Legend: N prefix positions, C positions of a chunk, V real vocabulary rows of this rank's shard,
R tensor-parallel ranks.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prefix.loss import gemm
from megatron_prefix.loss.divergence import (
    Divergence,
    gradient_factors,
    merge_statistics,
    token_values,
)
from megatron_prefix.loss.kernels import Kernels, kernels_for
from megatron_prefix.loss.labels import label_columns, label_logprobs

_CPU_CHUNK = 256
_GPU_CHUNK = 4096


@dataclass(frozen=True)
class Task:
    """One call of the loss: detached inputs, see ``prefix_divergence``."""

    student_hidden: Tensor  # [N, d_s]
    student_weight: Tensor  # [V/R, d_s], padded rows included
    teacher_hidden: Tensor  # [N, d_t]
    teacher_weight: Tensor  # [V/R, d_t]
    token_weight: Tensor  # fp32 [N]
    labels: Tensor | None  # int64 [N]
    divergence: Divergence
    vocab_size: int
    tp_group: ProcessGroup | None  # None: one rank
    chunk_size: int | None
    reduce_hidden_gradient: bool
    hidden_gradient: bool  # wanted
    weight_gradient: bool  # wanted
    main_grad: Tensor | None  # [V/R, d_s]

    @property
    def rank(self) -> int:
        return 0 if self.tp_group is None else dist.get_rank(self.tp_group)

    @property
    def first_row(self) -> int:
        return self.rank * self.student_weight.shape[0]

    @property
    def real_rows(self) -> int:
        return min(max(self.vocab_size - self.first_row, 0), self.student_weight.shape[0])

    def chunks(self) -> list[slice]:
        """The same on all ranks: of nothing but N and the device."""
        size = self.chunk_size or (_GPU_CHUNK if self.student_hidden.is_cuda else _CPU_CHUNK)
        positions = self.student_hidden.shape[0]
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
class _Work:
    """What the chunks share: the real rows of the heads, and the results they fill in."""

    task: Task
    kernels: Kernels
    student_weight: Tensor  # [V, d_s]
    teacher_weight: Tensor  # [V, d_t]
    kl: Tensor  # fp64 [N]
    label_logprobs: Tensor  # fp32 [N], or [0] without labels
    hidden_gradient: Tensor | None  # [N, d_s]
    weight_total: Tensor | None  # fp32 [V, d_s], added to
    reductions: list[dist.Work] = field(default_factory=list)  # of the hidden gradient, under way


def run_chunks(task: Task) -> Outcome:
    """All of one call's work."""
    weight_gradient = _weight_accumulator(task)
    work = _start(task, weight_gradient)
    _walk(work)
    for reduction in work.reductions:
        reduction.wait()
    if weight_gradient is not None and task.main_grad is not None:
        if weight_gradient is not task.main_grad:
            task.main_grad.add_(weight_gradient)
        weight_gradient = None
    return Outcome(
        loss=(task.token_weight.double() * work.kl).sum().float(),
        kl=work.kl.float(),
        label_logprobs=None if task.labels is None else work.label_logprobs,
        hidden_gradient=work.hidden_gradient,
        weight_gradient=weight_gradient,
    )


def _weight_accumulator(task: Task) -> Tensor | None:
    """fp32 [V/R, d_s]: main_grad itself where it is fp32."""
    if not task.weight_gradient:
        return None
    if task.main_grad is not None and task.main_grad.dtype == torch.float32:
        return task.main_grad
    return torch.zeros_like(task.student_weight, dtype=torch.float32)


def _start(task: Task, weight_gradient: Tensor | None) -> _Work:
    positions = task.student_hidden.shape[0]
    real = slice(0, task.real_rows)
    labelled = 0 if task.labels is None else positions
    return _Work(
        task=task,
        kernels=kernels_for(task.student_hidden.device),
        student_weight=task.student_weight[real],
        teacher_weight=task.teacher_weight[real],
        kl=task.token_weight.new_empty(positions, dtype=torch.float64),
        label_logprobs=task.token_weight.new_empty(labelled),
        hidden_gradient=torch.empty_like(task.student_hidden) if task.hidden_gradient else None,
        weight_total=None if weight_gradient is None else weight_gradient[real],
    )


def _walk(work: _Work) -> None:
    """One chunk after another on one rank; over ranks, two in flight with buffers of their own."""
    chunks = work.task.chunks()
    in_flight: _Chunk | None = None
    buffers = [_buffers(work) for _ in chunks[: 1 if work.task.tp_group is None else 2]]
    for index, positions in enumerate(chunks):
        chunk = _Chunk(work, positions, *buffers[index % len(buffers)])
        if work.task.tp_group is None:
            _advance(None, chunk)
            _advance(chunk, None)
        else:
            _advance(in_flight, chunk)
            in_flight = chunk
    _advance(in_flight, None)


def _buffers(work: _Work) -> tuple[Tensor, Tensor]:
    """Student and teacher logits of the longest chunk, fp32 [C, V]."""
    shape = (work.task.chunks()[0].stop, work.task.real_rows)
    empty = work.task.token_weight.new_empty
    return empty(shape), empty(shape)


def _advance(current: "_Chunk | None", following: "_Chunk | None") -> None:
    """Each GEMM of the following chunk runs while a collective of the current one travels."""
    if following is not None:
        following.student_logits()
    if current is not None:
        current.mixture()
    if following is not None:
        following.statistics()
    if current is not None:
        current.finish()


class _Gather:
    """An all-gather under way: a fixed order of ranks, unlike a reduction's."""

    def __init__(self, own: Tensor, group: ProcessGroup | None) -> None:
        self._own = own
        self._handle: dist.Work | None = None
        if group is None:
            self._everyone = own[None]
        else:
            self._everyone = own.new_empty((group.size(), *own.shape))
            self._handle = dist.all_gather_into_tensor(
                self._everyone.view(-1), own.view(-1), group=group, async_op=True
            )

    def wait(self) -> Tensor:
        """fp64 [R, ...] in rank order, the same on all ranks."""
        if self._handle is not None:
            self._handle.wait()
        return self._everyone


class _Chunk:
    """One chunk on its way from hidden states to gradients, in four steps."""

    def __init__(self, work: _Work, positions: slice, student: Tensor, teacher: Tensor) -> None:
        count = positions.stop - positions.start
        self._work = work
        self._positions = positions
        self._student, self._teacher = student[:count], teacher[:count]

    def student_logits(self) -> None:
        """Step 1."""
        hidden = self._work.task.student_hidden[self._positions]
        gemm.logits_into(self._student, hidden, self._work.student_weight)

    def statistics(self) -> None:
        """Step 2: teacher logits; sends out this rank's statistics."""
        task = self._work.task
        hidden = task.teacher_hidden[self._positions]
        gemm.logits_into(self._teacher, hidden, self._work.teacher_weight)
        columns = []
        if task.labels is not None:  # before the logits are overwritten
            columns.append(self._label_columns(task.labels))
        columns.insert(
            0, self._work.kernels.statistics(self._student, self._teacher, task.divergence)
        )
        self._statistics = _Gather(torch.cat(columns, 1), task.tp_group)

    def mixture(self) -> None:
        """Step 3: waits for the statistics; for jsd, sends out this rank's sums."""
        task = self._work.task
        gathered = self._statistics.wait()
        self._merged = merge_statistics(gathered, task.rank, task.divergence)
        if task.labels is not None:
            self._work.label_logprobs[self._positions] = label_logprobs(
                gathered,
                task.labels[self._positions],
                task.vocab_size,
                task.divergence.temperature,
            )
        if task.divergence.name == "jsd":
            own = self._work.kernels.mixture(
                self._student, self._teacher, self._merged, task.divergence
            )
            self._mixture = _Gather(own, task.tp_group)

    def finish(self) -> None:
        """Step 4: waits for the sums of jsd; values, the logit gradient and its two GEMMs."""
        work, task, positions = self._work, self._work.task, self._positions
        sums = self._mixture.wait().sum(0) if task.divergence.name == "jsd" else None
        work.kl[positions] = token_values(self._merged, sums, task.divergence)
        if not (task.hidden_gradient or task.weight_gradient):
            return
        factors = gradient_factors(
            self._merged, sums, task.token_weight[positions], task.divergence
        )
        gradient = self._work.kernels.logit_gradient(
            self._student, self._teacher, *factors, task.divergence
        )
        if work.hidden_gradient is not None:
            self._hidden_gradient(gradient, work.hidden_gradient[positions])
        if work.weight_total is not None:
            gemm.add_weight_gradient(work.weight_total, gradient, task.student_hidden[positions])

    def _hidden_gradient(self, gradient: Tensor, out: Tensor) -> None:
        task = self._work.task
        gemm.hidden_gradient_into(out, gradient, self._work.student_weight)
        if task.tp_group is not None and task.reduce_hidden_gradient:
            reduction = dist.all_reduce(out, group=task.tp_group, async_op=True)
            self._work.reductions.append(reduction)

    def _label_columns(self, labels: Tensor) -> Tensor:
        task = self._work.task
        return label_columns(
            self._student,
            labels[self._positions],
            task.first_row,
            task.divergence.temperature,
        )
