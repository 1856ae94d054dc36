"""One call of the loss, as it came: what is refused of it, and what its ranks must agree on.

Legend: N prefix positions, V rows of the (padded) vocabulary, R tensor-parallel ranks.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
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
        agreement = self._agree()  # before anything else is done to what this rank was given
        student, layout = self.student, self.layout
        return Task(
            student_hidden=student.hidden.detach(),
            student_weight=student.weight.detach(),
            teacher=_detached(self.teacher),
            token_weight=student.token_weight.detach(),
            labels=student.labels,
            divergence=self.divergence,
            vocab_size=layout.vocab_size,
            tp_group=layout.tp_group,
            agreement=agreement,
            chunk_size=layout.chunk_size,
            reduce_hidden_gradient=not layout.sequence_parallel,
            hidden_gradient=_wants_gradient(student.hidden),
            weight_gradient=_wants_gradient(student.weight),
            main_grad=self._main_grad,
            workspace=layout.workspace,
            overlap=self.overlap,
        )

    @property
    def _main_grad(self) -> Tensor | None:
        """Of a student's LM head that is trained."""
        weight = self.student.weight
        return getattr(weight, "main_grad", None) if _wants_gradient(weight) else None

    def _agree(self) -> Agreement | None:
        group = self.layout.tp_group
        if group is None:
            self._check()
            return None
        device = _meeting_device(self.student.hidden, group)
        try:
            self._check()
            facts = self._facts()
        except Exception as error:  # of any kind: the other ranks must not wait for this one
            Agreement({}, error, group, device).confirm()  # raises, on all of them
            raise
        return Agreement(facts, None, group, device)

    def _check(self) -> None:
        """ValueError for what does not fit on this rank by itself."""
        student, teacher, layout = self.student, self.teacher, self.layout
        checks.check_settings(self.divergence, layout.chunk_size)
        checks.check_given(self._tensors, may_be_none=("labels",))
        if isinstance(teacher, Head):
            checks.check_heads(student.hidden, student.weight, teacher.hidden, teacher.weight)
        else:
            checks.check_head("student", student.hidden, student.weight)
        if isinstance(teacher, TopK):
            checks.check_top_k_divergence(self.divergence)
            targets = teacher.ids, teacher.logprobs
            checks.check_top_k(student.hidden, *targets, layout.vocab_size)
        checks.check_tokens(student.hidden, student.token_weight, student.labels)
        checks.check_main_grad(student.weight, self._main_grad)
        checks.check_vocabulary(layout.vocab_size, student.weight.shape[0], layout.tp_group)

    @property
    def _tensors(self) -> dict[str, Tensor | None]:
        student = self.student
        return {
            "student_hidden": student.hidden,
            "student_weight": student.weight,
            "token_weight": student.token_weight,
            "labels": student.labels,
            **{f"teacher_{name}": tensor for name, tensor in vars(self.teacher).items()},
        }

    def _facts(self) -> dict[str, object]:
        """What decides which collectives follow, and of what sizes; and what no rank may be alone
        with, its gradient would be."""
        student, layout = self.student, self.layout
        return {name: _kind(tensor) for name, tensor in self._tensors.items()} | {
            "student_weight's main_grad": _kind(self._main_grad),
            "vocab_size": layout.vocab_size,
            "divergence": self.divergence,
            "chunk_size": layout.chunk_size,
            "sequence_parallel": layout.sequence_parallel,
            "a gradient to student_hidden": _wants_gradient(student.hidden),
        }


def _meeting_device(hidden: Tensor, group: ProcessGroup) -> torch.device:
    """Where the group carries tensors; a rank may have been given others, or none."""
    if "nccl" not in dist.get_backend(group):
        return torch.device("cpu")
    here = isinstance(hidden, Tensor) and hidden.is_cuda
    return hidden.device if here else torch.device("cuda", torch.cuda.current_device())


def _detached(teacher: Teacher) -> Teacher:
    return replace(teacher, **{name: each.detach() for name, each in vars(teacher).items()})


def _wants_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
