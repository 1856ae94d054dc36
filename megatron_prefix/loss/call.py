"""One call of the loss, as it came: what is refused of it, and what its ranks must agree on.

Legend: N prefix positions, V rows of the (padded) vocabulary, R tensor-parallel ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prefix.loss import checks
from megatron_prefix.loss.agreement import Agreement
from megatron_prefix.loss.buffers import Workspace
from megatron_prefix.loss.divergence import Divergence
from megatron_prefix.loss.overlap import TopKOverlap
from megatron_prefix.loss.task import Head, Task, Teacher, TopK


@dataclass(frozen=True)
class Student:
    """What gets gradients, and what its tokens weigh; as the public functions take them."""

    hidden: Tensor  # [N, d_s]
    weight: Tensor  # [V/R, d_s]
    token_weight: Tensor  # fp32 [N]
    labels: Tensor | None  # int64 [N]


@dataclass(frozen=True)
class Layout:
    """Over which ranks, and in how much memory."""

    vocab_size: int
    tp_group: ProcessGroup | None  # None: one rank
    sequence_parallel: bool
    chunk_size: int | None
    workspace: Workspace


def layout_of(
    vocab_size: int,
    tp_group: ProcessGroup | None,
    sequence_parallel: bool,
    chunk_size: int | None,
    workspace: Workspace | None,
) -> Layout:
    """A group of one rank is none, and a workspace that nobody keeps takes small pages."""
    group = None if tp_group is None or tp_group.size() == 1 else tp_group
    return Layout(
        vocab_size, group, sequence_parallel, chunk_size, workspace or Workspace(huge_pages=False)
    )


@dataclass(frozen=True)
class Call:
    student: Student
    teacher: Teacher
    divergence: Divergence
    layout: Layout
    overlap: TopKOverlap | None = None

    def task(self) -> Task:
        """The work to be done. Raises ValueError for what does not fit, over ranks on all of them
        alike, if not now then when the task's agreement is confirmed."""
        student, layout = self.student, self.layout
        return Task(
            student_hidden=student.hidden.detach(),
            student_weight=student.weight.detach(),
            teacher=self.teacher,
            token_weight=student.token_weight.detach(),
            labels=student.labels,
            divergence=self.divergence,
            vocab_size=layout.vocab_size,
            tp_group=layout.tp_group,
            agreement=self._agree(),
            chunk_size=layout.chunk_size,
            reduce_hidden_gradient=not layout.sequence_parallel,
            hidden_gradient=_wants_gradient(student.hidden),
            weight_gradient=_wants_gradient(student.weight),
            main_grad=getattr(student.weight, "main_grad", None),
            workspace=layout.workspace,
            overlap=self.overlap,
        )

    def _agree(self) -> Agreement | None:
        if self.layout.tp_group is None:
            self._check()
            return None
        facts, refusal = self._facts(), None
        try:
            self._check()
        except ValueError as error:
            refusal = error
        agreement = Agreement(facts, refusal, self.layout.tp_group, self.student.hidden.device)
        if refusal is not None:
            agreement.confirm()
        return agreement

    def _check(self) -> None:
        """ValueError for what does not fit on this rank by itself."""
        student, teacher, layout = self.student, self.teacher, self.layout
        checks.check_settings(self.divergence, layout.chunk_size)
        if isinstance(teacher, Head):
            checks.check_heads(student.hidden, student.weight, teacher.hidden, teacher.weight)
        else:
            checks.check_head("student", student.hidden, student.weight)
        if isinstance(teacher, TopK):
            checks.check_top_k_divergence(self.divergence)
            targets = teacher.ids, teacher.logprobs
            checks.check_top_k(student.hidden, *targets, layout.vocab_size)
        checks.check_tokens(student.hidden, student.token_weight, student.labels)
        checks.check_vocabulary(layout.vocab_size, student.weight.shape[0], layout.tp_group)

    def _facts(self) -> dict[str, object]:
        """What decides which collectives follow, and of what sizes."""
        student, layout = self.student, self.layout
        tensors = {
            "student_hidden": student.hidden,
            "student_weight": student.weight,
            "token_weight": student.token_weight,
            "labels": student.labels,
            **{f"teacher_{name}": tensor for name, tensor in vars(self.teacher).items()},
        }
        return {name: _kind(tensor) for name, tensor in tensors.items()} | {
            "vocab_size": layout.vocab_size,
            "divergence": self.divergence,
            "chunk_size": layout.chunk_size,
            "sequence_parallel": layout.sequence_parallel,
            "a gradient to student_hidden": _wants_gradient(student.hidden),
        }


def _wants_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
