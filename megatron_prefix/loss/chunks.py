"""The walk over the chunks: on one rank one after another, over ranks two in flight.

Legend: C positions of a chunk, V real vocabulary rows of this rank's shard, R tensor-parallel
ranks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prefix.loss.gather import start_all_gather
from megatron_prefix.loss.task import Outcome, Task, Work, begin


def run_chunks(task: Task) -> Outcome:
    """All of one call's work."""
    work = begin(task)
    if task.chunks:
        shape = task.chunks[0].stop, task.real_rows
        buffers = task.workspace.logits(task.buffers, shape, work.kl.device)
        if task.tp_group is None:
            _run_on_one_rank(work, buffers)
        else:
            half = len(buffers) // 2
            _run_over_ranks(work, [buffers[:half], buffers[half:]])
    else:
        work.confirm_agreement()
    return work.outcome()


def _run_on_one_rank(work: Work, buffers: Sequence[Tensor]) -> None:
    task = work.task
    for positions in task.chunks:
        own = _first_rows(buffers, positions)
        work.student_logits(positions, own[0])
        labels = work.label_columns(positions, own[0])
        token_weight = task.token_weight[positions] if work.differentiates else None
        done = work.rows(positions, own).one_rank(token_weight)
        work.kl[positions] = done.values
        work.set_label_logprobs(positions, torch.cat((done.statistics, labels), 1)[None])
        if work.differentiates:
            work.backpropagate(positions, done.gradient)
        del done  # in bf16 the gradient has memory of its own: not two chunks' at a time


def _run_over_ranks(work: Work, pairs: list[list[Tensor]]) -> None:
    """Each GEMM of the following chunk runs while a collective of the current one travels."""
    current: _Chunk | None = None
    for index, positions in enumerate(work.task.chunks):
        following = _Chunk(work, positions, _first_rows(pairs[index % len(pairs)], positions))
        following.student_logits()
        if current is None:
            work.confirm_agreement()  # the first GEMM is on its way
        else:
            current.merge()
        following.statistics()
        if current is not None:
            current.finish()
        current = following
    assert current is not None
    current.merge()
    current.finish()


def _first_rows(buffers: Sequence[Tensor], positions: slice) -> list[Tensor]:
    return [buffer[: positions.stop - positions.start] for buffer in buffers]


class _Chunk:
    """One chunk on its way from hidden states to gradients, in four steps."""

    def __init__(self, work: Work, positions: slice, buffers: Sequence[Tensor]) -> None:
        self._work, self._positions, self._student = work, positions, buffers[0]
        self._rows = work.rows(positions, buffers)

    def student_logits(self) -> None:
        """Step 1."""
        self._work.student_logits(self._positions, self._student)

    def statistics(self) -> None:
        """Step 2: teacher logits; sends out this rank's statistics."""
        labels = self._work.label_columns(self._positions, self._student)
        own = torch.cat((self._rows.statistics(), labels), 1)
        self._statistics = _Gather(own, self._work.task.tp_group)

    def merge(self) -> None:
        """Step 3: waits for the statistics; for jsd, sends out this rank's sums."""
        gathered = self._statistics.wait()
        own = self._rows.merge(gathered)
        self._work.set_label_logprobs(self._positions, gathered)
        self._sums = None if own is None else _Gather(own, self._work.task.tp_group)

    def finish(self) -> None:
        """Step 4: waits for the sums of jsd; values, the logit gradient and its two GEMMs."""
        work, positions = self._work, self._positions
        sums = None if self._sums is None else self._sums.wait().sum(0)
        work.kl[positions] = self._rows.values(sums)
        if work.differentiates:
            gradient = self._rows.gradient(sums, work.task.token_weight[positions])
            work.backpropagate(positions, gradient)


class _Gather:
    """An all-gather under way."""

    def __init__(self, own: Tensor, group: ProcessGroup | None) -> None:
        assert group is not None
        self._own = own  # must live as long as the collective
        self._everyone, self._handle = start_all_gather(own, group)

    def wait(self) -> Tensor:
        """fp64 [R, ...] in rank order, the same on all ranks."""
        self._handle.wait()
        return self._everyone
