"""The teacher: hidden states of the student's prefix positions, brought to the student's ranks.

The LM head is not the teacher's to apply: it lies in the student's vocabulary shards, where the
divergence meets both (docs/architecture.md). Where the trunk is, docs/teachers.md tells.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.batch import MicrobatchPlan, pack, padded_for, prefix_count
from megatron_prefix.context_shares import of_all_shares
from megatron_prefix.layout import Layout
from megatron_prefix.mcore.groups import ModelGroups
from megatron_prefix.mcore.hf_map import HfModel
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.offload import HostWeights
from megatron_prefix.mcore.schedule import run_schedule
from megatron_prefix.mcore.weights import head_shard, load_hf_weights
from megatron_prefix.placement import IN_FLIGHT, Route, WorldLayout, routes
from megatron_prefix.types import PrefixBatch, Rollout, Targets, TeacherHead, TeacherTargets


class Teacher(Protocol):
    """Anything that can score the student's prefixes."""

    def targets(self, rollouts: Sequence[Rollout], plan: MicrobatchPlan) -> Iterable[Targets]:
        """Targets of this rank's student microbatches, in order; empty off the last stage.

        Collective over the teacher's and the student's ranks. Each is taken when its microbatch's
        divergence runs, and may come in no earlier.
        """


class SeveralTeachers:
    """Each microbatch's targets from the teacher of its domain."""

    def __init__(self, teachers: Mapping[str, Teacher], student: ModelGroups) -> None:
        self.each, self._student = dict(teachers), student

    def targets(self, rollouts: Sequence[Rollout], plan: MicrobatchPlan) -> Iterator[Targets]:
        by_domain = {
            domain: iter(teacher.targets(rollouts, plan)) for domain, teacher in self.each.items()
        }
        groups = self._student
        own = plan.of_replica(groups.dp_rank, groups.layout.dp) if groups.is_last_stage else ()
        return (next(by_domain[plan.domain(microbatch)]) for microbatch in own)


def in_host_memory(teacher: Teacher | None) -> list[HostWeights]:
    """Of the teachers on this rank whose weights are offloaded, in the order of their turns."""
    each = teacher.each.values() if isinstance(teacher, SeveralTeachers) else (teacher,)
    colocated = [one for one in each if isinstance(one, ColocatedTeacher)]
    return [one.host_weights for one in colocated if one.host_weights]


class TeacherLost(RuntimeError):
    """A separate teacher's rank did not answer."""


def load_teacher_head(
    student: MegatronModel, teacher: HfModel, dtype: torch.dtype, device: torch.device
) -> TeacherHead:
    """A teacher's LM head on a rank of the student's last stage, from the teacher's folder: its
    trunk may be on other ranks.

    One tokenizer may be padded to two sizes: rows past the smaller are no tokens.
    """
    vocab = min(student.hf.shape.vocab_size, teacher.shape.vocab_size)
    weight = head_shard(teacher, student.vocab_rows, student.groups.tp_rank, vocab, dtype)
    return TeacherHead(weight.to(device), vocab)


@torch.no_grad()
def score_in_turn(
    model: MegatronModel,
    batches: Sequence[PrefixBatch],
    on_hidden: Callable[[int, Tensor], object],
) -> None:
    """Run the trunk over ``batches``; on its last stage ``on_hidden(index, hidden [N, d_t])`` gets
    each one's hidden states in turn, on every context-parallel rank all of them, and nothing keeps
    them. Collective over the teacher."""
    turns = iter(range(len(batches)))

    def on_prefix(share: PrefixBatch, hidden: Tensor, head: Tensor | None) -> Tensor:
        on_hidden(next(turns), of_all_shares(hidden, share.rows, model.groups.pg.cp))
        return hidden.new_zeros(())

    run_schedule(model, model.module, batches, on_prefix, forward_only=True)


def own_turns(ways: Sequence[Route], groups: ModelGroups) -> list[Route]:
    """What one of a teacher's replicas scores.

    Replicas that share experts meet in every microbatch, so all have equally many: some score one
    once more, which :func:`is_spare` tells.
    """
    replicas = groups.layout.dp
    spare = -len(ways) % replicas if groups.layout.ep > 1 else 0
    return [*ways, *[ways[0]] * spare][groups.dp_rank :: replicas] if ways else []


def is_spare(index: int, ways: Sequence[Route], groups: ModelGroups) -> bool:
    """Whether the ``index``-th of :func:`own_turns` is scored for nothing."""
    return groups.dp_rank + index * groups.layout.dp >= len(ways)


class ColocatedTeacher:
    """A Megatron teacher on the student's own ranks, in a layout of its own.

    With ``offload`` its weights are on the device while it scores, and in host memory otherwise.
    """

    def __init__(
        self,
        model: MegatronModel,
        student: Layout,
        device: torch.device,
        domain: str = "",
        *,
        offload: bool = False,
    ) -> None:
        self._model, self._student, self._device = model, student, device
        self._domain = domain
        model.module.requires_grad_(False).eval()
        self.host_weights = HostWeights(model.module) if offload else None

    def reload(self, folder: Path) -> None:
        """Other weights of the same model, from a Hugging Face folder."""
        host = self.host_weights
        with host.here() if host else nullcontext():
            load_hf_weights(replace(self._model, hf=replace(self._model.hf, path=folder)))
            if host:
                host.keep()

    def targets(self, rollouts: Sequence[Rollout], plan: MicrobatchPlan) -> list[TeacherTargets]:
        groups = self._model.groups
        ways = routes(
            len(plan), self._student, groups.layout, lambda m: plan.domain(m) == self._domain
        )
        mine = [way.microbatch for way in own_turns(ways, groups)]
        scored: dict[int, Tensor] = {}
        plan = padded_for(groups.layout.cp, rollouts, plan)
        with self._ready_to_score(bool(mine)):
            score_in_turn(
                self._model,
                [pack(rollouts, plan, m, self._device) for m in mine],
                lambda index, hidden: scored.setdefault(mine[index], hidden),
            )
        return self._deliver(scored, ways, rollouts, plan)

    def _ready_to_score(self, anything: bool) -> AbstractContextManager[None]:
        """Within it the weights are on the device, if they are wanted there; not after it."""
        if self.host_weights is None:
            return nullcontext()
        if anything:
            return self.host_weights.here()
        self.host_weights.release()  # they may have been expected
        return nullcontext()

    def _deliver(
        self,
        scored: dict[int, Tensor],
        ways: Sequence[Route],
        rollouts: Sequence[Rollout],
        plan: MicrobatchPlan,
    ) -> list[TeacherTargets]:
        """Each microbatch's hidden states from a teacher's last stage to a student's."""
        rank = dist.get_rank()
        ops: list[dist.P2POp] = []
        received: list[Tensor] = []
        for way in ways:
            for sender, receiver in way.pairs:
                if rank == receiver and rank == sender:
                    received.append(scored[way.microbatch])
                elif rank == sender:
                    hidden = scored[way.microbatch].contiguous()
                    ops.append(dist.P2POp(dist.isend, hidden, receiver))
                elif rank == receiver:
                    buffer = torch.empty(
                        (
                            prefix_count(rollouts, plan, way.microbatch),
                            self._model.hf.shape.hidden_size,
                        ),
                        dtype=self._model.config.params_dtype,
                        device=self._device,
                    )
                    ops.append(dist.P2POp(dist.irecv, buffer, sender))
                    received.append(buffer)
        if ops:
            for work in dist.batch_isend_irecv(ops):
                work.wait()
        return [TeacherTargets(hidden) for hidden in received]


@dataclass(frozen=True)
class Link:
    """What a separate teacher's ranks and the student's have between them."""

    group: dist.ProcessGroup  # all ranks of both
    layout: WorldLayout
    device: torch.device
    dtype: torch.dtype  # of the hidden states: the teacher's params_dtype
    width: int  # d_t
    domain: str = ""  # that the teacher teaches

    def routes(self, plan: MicrobatchPlan) -> list[Route]:
        """Of the teacher's microbatches."""
        teacher = self.layout.teachers[self.domain]
        return routes(
            len(plan), self.layout.student, teacher, lambda m: plan.domain(m) == self.domain
        )


class SeparateTeacher:
    """On the student's ranks: a teacher whose trunk is elsewhere in the world.

    A receiver keeps ``IN_FLIGHT`` buffers posted, so that hidden states come in while the student
    computes, and holds no more of them than those.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def targets(
        self, rollouts: Sequence[Rollout], plan: MicrobatchPlan
    ) -> Iterator[TeacherTargets]:
        rank = dist.get_rank()
        expected = [
            (way.microbatch, sender)
            for way in self._link.routes(plan)
            for sender, receiver in way.pairs
            if receiver == rank
        ]
        sizes = [prefix_count(rollouts, plan, microbatch) for microbatch, _ in expected]
        return _Incoming(self._link, expected, sizes)


class _Incoming(Iterator[TeacherTargets]):
    """A step's hidden states, in order; receives are posted from the start on."""

    def __init__(
        self, link: Link, expected: Sequence[tuple[int, int]], sizes: Sequence[int]
    ) -> None:
        self._link = link
        self._waiting = deque(zip(expected, sizes, strict=True))
        self._posted: deque[tuple[int, int, Tensor, dist.Work | None]] = deque()
        self._post()

    def __next__(self) -> TeacherTargets:
        if not self._posted:
            raise StopIteration
        microbatch, sender, hidden, work = self._posted.popleft()
        if work is not None:
            try:
                work.wait()
            except RuntimeError as error:
                raise TeacherLost(
                    f"no hidden states of microbatch {microbatch} from the teacher's rank {sender}:"
                    f" it died, or did not answer in run.distributed_timeout_s ({error})"
                ) from error
        self._post()
        return TeacherTargets(hidden)

    def _post(self) -> None:
        while self._waiting and len(self._posted) < IN_FLIGHT:
            (microbatch, sender), size = self._waiting.popleft()
            link = self._link
            hidden = torch.empty((size, link.width), dtype=link.dtype, device=link.device)
            work = dist.irecv(hidden, sender, group=link.group) if size else None
            self._posted.append((microbatch, sender, hidden, work))


class TeacherRank:
    """On a rank of a separate teacher: scores a step's microbatches and sends what it finds."""

    def __init__(self, model: MegatronModel, link: Link) -> None:
        self._model, self._link = model, link
        model.module.requires_grad_(False).eval()

    def score(self, rollouts: Sequence[Rollout], plan: MicrobatchPlan) -> None:
        """The other side of :meth:`SeparateTeacher.targets`; at most ``IN_FLIGHT`` microbatches
        are kept until they are received. Collective over the teacher."""
        groups, ways = self._model.groups, self._link.routes(plan)
        mine = own_turns(ways, groups)
        plan = padded_for(groups.layout.cp, rollouts, plan)
        batches = [pack(rollouts, plan, way.microbatch, self._link.device) for way in mine]
        outgoing: deque[list[tuple[dist.Work, Tensor]]] = deque()

        def send(index: int, hidden: Tensor) -> None:
            if is_spare(index, ways, groups):
                return
            outgoing.append(self._send(mine[index], hidden.contiguous()))
            while len(outgoing) > IN_FLIGHT:
                _finish(outgoing.popleft())

        score_in_turn(self._model, batches, send)
        while outgoing:
            _finish(outgoing.popleft())

    def _send(self, way: Route, hidden: Tensor) -> list[tuple[dist.Work, Tensor]]:
        if not len(hidden):  # a microbatch of padding alone
            return []
        rank, sent = dist.get_rank(), []
        for sender, receiver in way.pairs:
            if sender == rank:
                work = dist.isend(hidden, receiver, group=self._link.group)
                assert work is not None  # this rank is in the group
                sent.append((work, hidden))
        return sent


def _finish(sent: Iterable[tuple[dist.Work, Tensor]]) -> None:
    for work, _ in sent:
        work.wait()
