"""The walk over the chunks: on one rank one after another, over ranks two in flight.

Legend: C positions of a chunk, V real vocabulary rows of this rank's shard, R tensor-parallel
ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prefix.loss.divergence import gradient_factors, merge_statistics, token_values
from megatron_prefix.loss.task import Outcome, Task, Work, begin


def run_chunks(task: Task) -> Outcome:
    """All of one call's work."""
    work = begin(task)
    if task.chunks:
        shape = task.chunks[0].stop, task.real_rows
        buffers = task.workspace.logits(2 * task.chunks_in_flight, shape, work.kl.device)
        if task.tp_group is None:
            _run_on_one_rank(work, *buffers)
        else:
            _run_over_ranks(work, [(buffers[0], buffers[1]), (buffers[2], buffers[3])])
    return work.outcome()


def _run_on_one_rank(work: Work, student: Tensor, teacher: Tensor) -> None:
    task = work.task
    for positions in task.chunks:
        count = positions.stop - positions.start
        x, y = student[:count], teacher[:count]
        work.student_logits(positions, x)
        work.teacher_logits(positions, y)
        labels = work.label_columns(positions, x)
        token_weight = task.token_weight[positions] if work.differentiates else None
        rows = work.kernels.one_rank(x, y, token_weight, task.divergence, work.student_weight.dtype)
        work.kl[positions] = rows.values
        work.set_label_logprobs(positions, torch.cat((rows.statistics, labels), 1)[None])
        if work.differentiates:
            work.backpropagate(positions, rows.gradient)


def _run_over_ranks(work: Work, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Each GEMM of the following chunk runs while a collective of the current one travels."""
    current: _Chunk | None = None
    for index, positions in enumerate(work.task.chunks):
        following = _Chunk(work, positions, *pairs[index % len(pairs)])
        following.student_logits()
        if current is not None:
            current.mixture()
        following.statistics()
        if current is not None:
            current.finish()
        current = following
    assert current is not None
    current.mixture()
    current.finish()


class _Chunk:
    """One chunk on its way from hidden states to gradients, in four steps."""

    def __init__(self, work: Work, positions: slice, student: Tensor, teacher: Tensor) -> None:
        count = positions.stop - positions.start
        self._work = work
        self._positions = positions
        self._student, self._teacher = student[:count], teacher[:count]

    def student_logits(self) -> None:
        """Step 1."""
        self._work.student_logits(self._positions, self._student)

    def statistics(self) -> None:
        """Step 2: teacher logits; sends out this rank's statistics."""
        work, task = self._work, self._work.task
        work.teacher_logits(self._positions, self._teacher)
        labels = work.label_columns(self._positions, self._student)
        own = work.kernels.statistics(self._student, self._teacher, task.divergence)
        self._statistics = _Gather(torch.cat((own, labels), 1), task.tp_group)

    def mixture(self) -> None:
        """Step 3: waits for the statistics; for jsd, sends out this rank's sums."""
        work, task = self._work, self._work.task
        gathered = self._statistics.wait()
        self._merged = merge_statistics(gathered, task.rank, task.divergence)
        work.set_label_logprobs(self._positions, gathered)
        if task.divergence.name == "jsd":
            buffers = self._student, self._teacher
            own = work.kernels.mixture(*buffers, self._merged, task.divergence)
            self._mixture = _Gather(own, task.tp_group)

    def finish(self) -> None:
        """Step 4: waits for the sums of jsd; values, the logit gradient and its two GEMMs."""
        work, task, positions = self._work, self._work.task, self._positions
        sums = self._mixture.wait().sum(0) if task.divergence.name == "jsd" else None
        work.kl[positions] = token_values(self._merged, sums, task.divergence)
        if work.differentiates:
            weight = task.token_weight[positions]
            factors = gradient_factors(self._merged, sums, weight, task.divergence)
            settings = factors, task.divergence, work.student_weight.dtype
            gradient = work.kernels.logit_gradient(self._student, self._teacher, *settings)
            work.backpropagate(positions, gradient)


class _Gather:
    """An all-gather under way: a fixed order of ranks, unlike a reduction's."""

    def __init__(self, own: Tensor, group: ProcessGroup | None) -> None:
        assert group is not None
        self._own = own  # must live as long as the collective
        self._everyone = own.new_empty((group.size(), *own.shape))
        handle = dist.all_gather_into_tensor(
            self._everyone.view(-1), own.view(-1), group=group, async_op=True
        )
        assert handle is not None
        self._handle = handle

    def wait(self) -> Tensor:
        """fp64 [R, ...] in rank order, the same on all ranks."""
        self._handle.wait()
        return self._everyone
