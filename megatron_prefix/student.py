"""The student's half of a step: forward, the divergence on its prefix positions, backward."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_prefix.config import LossConfig
from megatron_prefix.context_shares import of_all_shares, rows_of
from megatron_prefix.loss import (
    DivergenceResult,
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
from megatron_prefix.weighing.prefix_sums import PrefixSums, Tally


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
    seen = Tally(prefix_length, batches[0].input_ids.device, kept)
    divergence = _divergence(model, targets, objective, seen)
    student.zero_grad()
    run_schedule(model, student.ddp, batches, divergence, forward_only=False)
    return seen.reduce(counts=model.groups.counts_own_tokens)


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
    seen = Tally(prefix_length, batches[0].input_ids.device)
    model.module.eval()
    try:
        divergence = _divergence(model, targets, objective, seen)
        run_schedule(model, model.module, batches, divergence, forward_only=True)
    finally:
        model.module.train()
    return seen.reduce(counts=model.groups.counts_own_tokens)


def _divergence(
    model: MegatronModel,
    targets: Iterable[Targets] | None,
    objective: Objective,
    seen: Tally,
) -> OnPrefix:
    """What the last stage does with a microbatch's hidden states; ``seen`` gathers what it saw."""
    waiting: Iterator[Targets | None] = itertools.repeat(None) if targets is None else iter(targets)

    def divergence(batch: PrefixBatch, hidden: Tensor, head: Tensor | None) -> Tensor:
        assert head is not None
        target = next(waiting)
        target = target and rows_of(target, batch.rows)
        overlap = _overlap(batch, target, objective)
        result = _compare(model, batch, hidden, head, target, objective, overlap)
        assert result.label_logprobs is not None
        teacher_head = objective.head_of(batch.domain)
        heads = _heads(head, target, teacher_head)
        seen.watch(result.kl, batch.token_weight, target, heads)
        seen.add(batch, result.loss.detach(), result.kl, result.label_logprobs)
        shares = overlap.shares(model.groups.pg.tp) if overlap else None
        if shares is not None:
            seen.add_overlap(batch, shares)
        kept = result.kl if objective.keeps == "kl" else shares
        if seen.kept is not None and kept is not None:
            seen.kept.append(of_all_shares(kept.detach(), batch.rows, model.groups.pg.cp))
        if isinstance(target, TeacherTargets) and len(batch.ends):
            theirs = _stop_logprobs(model, batch, target, objective)
            seen.add_stops(result.label_logprobs[batch.ends], theirs)
        return result.loss

    return divergence


def _overlap(
    batch: PrefixBatch, target: Targets | None, objective: Objective
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
