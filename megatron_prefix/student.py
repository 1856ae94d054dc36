"""The student's half of a step: forward, the divergence on its prefix positions, backward."""

import functools
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.config import LossConfig
from megatron_prefix.loss import (
    DivergenceResult,
    FiniteCheck,
    Workspace,
    prefix_cross_entropy,
    prefix_divergence,
    top_k_divergence,
)
from megatron_prefix.loss.overlap import TopKOverlap
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.optimizer import TrainableStudent
from megatron_prefix.mcore.schedule import OnPrefix, run_schedule
from megatron_prefix.types import PrefixBatch, Targets, TeacherHead, TeacherTargets, TopKTargets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Objective:
    """What the student's last stage computes, and with what; kept for the whole run."""

    loss: LossConfig
    teacher_head: TeacherHead | None  # on the last stage; never for a teacher of top-k targets
    workspace: Workspace = field(default_factory=Workspace)
    # Other teachers', by domain.
    more_heads: Mapping[str, TeacherHead] = field(default_factory=dict)
    # Tokens that the student shares with teachers of top-k targets, by domain; else its own count.
    common_vocabulary: Mapping[str, int] = field(default_factory=dict)
    overlap_k: int = 0  # likeliest tokens of both models that are compared; 0: none
    keeps: str = "kl"  # kl | overlap: what forward_backward keeps by token

    def head_of(self, domain: str) -> TeacherHead | None:
        return self.more_heads.get(domain) if domain else self.teacher_head

    def tokens_shared(self, domain: str, own: int) -> int:
        """Of the student's ``own``, those that a teacher of top-k targets has too."""
        return self.common_vocabulary.get(domain, own)


@dataclass(frozen=True)
class WorstToken:
    """The sampled token on whose log-probability server and trainer differ most."""

    server: float
    trainer: float

    @property
    def difference(self) -> float:
        return abs(self.server - self.trainer)


@dataclass(frozen=True)
class PrefixSums:
    """Sums over the prefix tokens of a step, over all ranks, the same on every rank."""

    loss: float
    kl: Tensor  # float64 [prefix_length]
    tokens: Tensor  # float64 [prefix_length]
    sampled: float  # tokens that a server sampled, among those counted
    logprob_diff: float  # sum of |server - trainer| over them
    stops: float  # stop tokens that the teacher scored
    stop_diff: float  # sum over them of the student's minus the teacher's log-probability
    worst: WorstToken
    overlap: Tensor  # float64 [prefix_length]; of no meaning where objective.overlap_k is 0


class _Accumulator:
    """Gathers what the microbatches show, without a device synchronisation."""

    def __init__(
        self, prefix_length: int, device: torch.device, kept: list[Tensor] | None = None
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.loss, self.diff, self.sampled = zeros(), zeros(), zeros()
        self.kl, self.tokens, self.overlap = (zeros(prefix_length) for _ in range(3))
        self.worst = zeros(2)  # server, trainer
        self.stops, self.stop_diff = zeros(), zeros()
        self.kept = kept
        self._watched: list[_Watched] = []  # by microbatch

    @torch.no_grad()
    def add(self, batch: PrefixBatch, loss: Tensor, kl: Tensor, logprobs: Tensor) -> None:
        self.loss += loss
        self.kl.index_add_(0, batch.prefix_offsets, kl.double())
        self.tokens.index_add_(0, batch.prefix_offsets, torch.ones_like(kl, dtype=torch.float64))
        if kl.numel():
            pairs = torch.stack([batch.rollout_logprobs, logprobs], dim=1).double()
            sampled = ~batch.rollout_logprobs.isnan()
            diff = (pairs[:, 0] - pairs[:, 1]).abs()
            self.sampled += sampled.sum()
            self.diff += diff.where(sampled, 0.0).sum()
            # index_select: indexing with a tensor of no dimension would read it back.
            worst = diff.where(sampled, -1.0).argmax().view(1)
            pair, known = (each.index_select(0, worst)[0] for each in (pairs, sampled))
            self.worst = _further_apart(self.worst, pair.where(known, 0.0))

    def add_overlap(self, batch: PrefixBatch, shares: Tensor) -> None:
        """``shares`` fp32 [N]."""
        self.overlap.index_add_(0, batch.prefix_offsets, shares.double())

    def add_stops(self, student: Tensor, teacher: Tensor) -> None:
        """Log-probabilities [E] of the stop tokens that ended rollouts."""
        self.stops += len(student)
        self.stop_diff += (student - teacher).double().sum()

    def watch(self, kl: Tensor, target: Targets | None, heads: dict[str, Tensor]) -> None:
        """The target is looked at now: it may be gone before the step ends. Heads live on."""
        given = {} if target is None else vars(target)
        checks = [FiniteCheck.of(f"the teacher's {name}", value) for name, value in given.items()]
        self._watched.append(_Watched(FiniteCheck.of("divergence", kl), checks, heads))

    def tell_non_finite(self) -> None:
        """Where, and in which input; waits for the device."""
        for number, watched in enumerate(self._watched):
            problem = watched.divergence.problem()
            if problem is not None:
                checks = [*watched.target, *(FiniteCheck.of(*h) for h in watched.heads.items())]
                told = "; ".join(filter(None, (check.problem() for check in checks))) or (
                    f"{', '.join(check.name for check in checks)} are finite here, so it is the "
                    "student's hidden state there, or another rank's shard"
                )
                logger.warning("microbatch %d of this rank: %s: %s", number, problem, told)


@dataclass(frozen=True)
class _Watched:
    """What a microbatch's divergence was made of, should it not be finite."""

    divergence: FiniteCheck
    target: list[FiniteCheck]
    heads: dict[str, Tensor]


def forward_backward(
    student: TrainableStudent,
    batches: Sequence[PrefixBatch],
    targets: Iterable[Targets] | None,
    objective: Objective,
    prefix_length: int,
    kept: list[Tensor] | None = None,
) -> PrefixSums:
    """Gradients of this rank's microbatches, reduced over data-parallel ranks, in ``main_grad``.

    ``targets`` and the objective's head are given on the last stage alone; None on all of them:
    the loss is the cross-entropy to the prefixes' own tokens. ``kept``: is filled with what
    ``objective.keeps`` of each microbatch's tokens [N]. Collective.
    """
    model = student.model
    seen = _Accumulator(prefix_length, batches[0].input_ids.device, kept)
    divergence = _divergence(model, targets, objective, seen)
    student.zero_grad()
    run_schedule(model, student.ddp, batches, divergence, forward_only=False)
    return _reduce(seen, counts=model.groups.counts)


@torch.no_grad()
def score(
    student: TrainableStudent,
    batches: Sequence[PrefixBatch],
    targets: Iterable[Targets],
    objective: Objective,
    prefix_length: int,
) -> PrefixSums:
    """The sums of :func:`forward_backward` without gradients: nothing is trained. Collective."""
    model = student.model
    seen = _Accumulator(prefix_length, batches[0].input_ids.device)
    model.module.eval()
    try:
        divergence = _divergence(model, targets, objective, seen)
        run_schedule(model, model.module, batches, divergence, forward_only=True)
    finally:
        model.module.train()
    return _reduce(seen, counts=model.groups.counts)


def _divergence(
    model: MegatronModel,
    targets: Iterable[Targets] | None,
    objective: Objective,
    seen: _Accumulator,
) -> OnPrefix:
    """What the last stage does with a microbatch's hidden states; ``seen`` gathers what it saw."""
    waiting: Iterator[Targets | None] = itertools.repeat(None) if targets is None else iter(targets)

    def divergence(batch: PrefixBatch, hidden: Tensor, head: Tensor | None) -> Tensor:
        assert head is not None
        target = next(waiting)
        overlap = _overlap(model, batch, target, objective)
        result = _compare(model, batch, hidden, head, target, objective, overlap)
        assert result.label_logprobs is not None
        teacher_head = objective.head_of(batch.domain)
        seen.watch(result.kl, target, _heads(head, target, teacher_head))
        seen.add(batch, result.loss.detach(), result.kl, result.label_logprobs)
        shares = overlap.shares(model.groups.pg.tp) if overlap else None
        if shares is not None:
            seen.add_overlap(batch, shares)
        kept = result.kl if objective.keeps == "kl" else shares
        if seen.kept is not None and kept is not None:
            seen.kept.append(kept.detach())
        if isinstance(target, TeacherTargets) and len(batch.ends):
            theirs = _stop_logprobs(model, batch, target, objective)
            seen.add_stops(result.label_logprobs[batch.ends], theirs)
        return result.loss

    return divergence


def _overlap(
    model: MegatronModel, batch: PrefixBatch, target: Targets | None, objective: Objective
) -> TopKOverlap | None:
    """To be filled by the divergence, where it makes a teacher's logits."""
    if not (objective.overlap_k and isinstance(target, TeacherTargets)):
        return None
    head, labels = objective.head_of(batch.domain), batch.labels
    assert head is not None
    return TopKOverlap(objective.overlap_k, len(labels), head.vocab_size, labels.device)


@torch.no_grad()
def _stop_logprobs(
    model: MegatronModel, batch: PrefixBatch, target: TeacherTargets, objective: Objective
) -> Tensor:
    """The teacher's log-probabilities [E] of the stop tokens that ended rollouts."""
    head, labels = objective.head_of(batch.domain), batch.labels[batch.ends]
    assert head is not None
    result = prefix_cross_entropy(
        target.hidden[batch.ends],
        head.weight,
        labels,
        torch.ones(len(labels), device=labels.device),
        vocab_size=head.vocab_size,
        tp_group=model.groups.pg.tp,
    )
    return -result.kl


def _heads(
    head: Tensor, target: Targets | None, teacher_head: TeacherHead | None
) -> dict[str, Tensor]:
    heads = {"the student's LM head": head}
    if target is not None and teacher_head is not None:
        heads["the teacher's LM head"] = teacher_head.weight
    return heads


def _compare(
    model: MegatronModel,
    batch: PrefixBatch,
    hidden: Tensor,
    head: Tensor,
    target: Targets | None,
    objective: Objective,
    overlap: TopKOverlap | None,
) -> DivergenceResult:
    """The divergence from a teacher of either kind; without one the cross-entropy."""
    loss, teacher_head = objective.loss, objective.head_of(batch.domain)
    settings: dict[str, Any] = {
        "tp_group": model.groups.pg.tp,
        "chunk_size": loss.chunk_size or None,
        "sequence_parallel": model.config.sequence_parallel,
        "workspace": objective.workspace,
    }
    if target is None:
        settings["vocab_size"] = model.hf.shape.vocab_size
        return prefix_cross_entropy(hidden, head, batch.labels, batch.token_weight, **settings)
    settings |= {
        "divergence": loss.divergence,
        "beta": loss.mixture if loss.divergence == "relaxed_kl" else loss.beta,
        "temperature": loss.temperature,
        "labels": batch.labels,
    }
    if isinstance(target, TopKTargets):
        settings["vocab_size"] = objective.tokens_shared(batch.domain, model.hf.shape.vocab_size)
        given = target.ids, target.logprobs
        return top_k_divergence(hidden, head, *given, batch.token_weight, **settings)
    assert teacher_head is not None
    settings["vocab_size"] = teacher_head.vocab_size
    given = target.hidden, teacher_head.weight
    return prefix_divergence(hidden, head, *given, batch.token_weight, overlap=overlap, **settings)


def _further_apart(a: Tensor, b: Tensor) -> Tensor:
    """The pair [2] whose halves differ more; a NaN counts as differing most."""
    apart_a, apart_b = ((pair[0] - pair[1]).abs() for pair in (a, b))
    return torch.where((apart_b > apart_a) | apart_b.isnan(), b, a)


def _reduce(seen: _Accumulator, *, counts: bool) -> PrefixSums:
    """Sums over the world; ranks that hold copies (other stages, other tp ranks) give zeros."""
    scalars = torch.stack([seen.loss, seen.diff, seen.sampled, seen.stops, seen.stop_diff])
    sums = torch.cat([scalars, seen.kl, seen.tokens, seen.overlap])
    if not counts:
        sums.zero_()
    dist.all_reduce(sums)
    pairs = [torch.empty_like(seen.worst) for _ in range(dist.get_world_size())]
    dist.all_gather(pairs, seen.worst)
    host, positions = sums.cpu(), sums[len(scalars) :].cpu().chunk(3)
    if not host.isfinite().all():
        seen.tell_non_finite()
    server, trainer = functools.reduce(_further_apart, pairs).tolist()
    return PrefixSums(
        loss=float(host[0]),
        kl=positions[0],
        tokens=positions[1],
        sampled=float(host[2]),
        logprob_diff=float(host[1]),
        stops=float(host[3]),
        stop_diff=float(host[4]),
        worst=WorstToken(server, trainer),
        overlap=positions[2],
    )
