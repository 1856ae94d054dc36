"""Token weights out of the teacher's view of a step, or the student's own, in place of the uniform
ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.config import TokenWeightConfig
from megatron_prefix.loss.teacher_view import TeacherView, teacher_view
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.student import Objective
from megatron_prefix.types import PrefixBatch, Targets, TopKTargets
from megatron_prefix.weighing.entropy_choice import choose
from megatron_prefix.weighing.token_weights import raw_weights, reward_weights


@dataclass(frozen=True)
class Weighted:
    batches: list[PrefixBatch]  # on the last stage with weights that sum to 1 over all ranks
    targets: Iterable[Targets] | None  # those that the weights came from, for the loss
    effective_share: float  # (sum w)^2 / (N sum w^2): 1 where all tokens count alike


def reweigh(
    model: MegatronModel,
    batches: Sequence[PrefixBatch],
    targets: Sequence[Targets],
    objective: Objective,
    config: TokenWeightConfig,
) -> Weighted:
    """The microbatches with weights by ``config.rule``. The one denominator is the weights' sum
    over all ranks, so their loss is a mean as before. Collective over the world.
    """
    if config.rule == "entropy":
        chosen = choose(model, batches, objective, config.share)
        return Weighted(chosen.batches, targets, chosen.share)
    pairs = zip(batches, targets, strict=True) if targets else ()
    raw = [_raw(model, batch, target, objective, config) for batch, target in pairs]
    sums = torch.zeros(3, dtype=torch.float64, device=batches[0].input_ids.device)
    if model.groups.counts:
        for weights in raw:
            sums += torch.stack([weights.sum(), weights.square().sum(), _count(weights)])
    dist.all_reduce(sums)
    total, squares, tokens = sums.tolist()
    if not total:  # a rule that leaves nothing of a step has nothing to say of it
        raw, total, squares = [torch.ones_like(weights) for weights in raw], tokens, tokens
    weighted = [
        replace(batch, token_weight=(weights / total).float())
        for batch, weights in zip(batches, raw, strict=bool(raw))
    ]
    share = total * total / (tokens * squares)
    return Weighted(weighted or list(batches), targets, share)


def _raw(
    model: MegatronModel,
    batch: PrefixBatch,
    target: Targets,
    objective: Objective,
    config: TokenWeightConfig,
) -> Tensor:
    view = _view(model, batch, target, objective)
    if config.rule == "reward":
        sampled = batch.rollout_logprobs
        return reward_weights(sampled, view.label_logprobs, objective.loss.mixture)
    seen = view.label_logprobs, view.margin
    return raw_weights(config, batch.prefix_offsets, batch.rollout_logprobs, *seen)


def _view(
    model: MegatronModel, batch: PrefixBatch, target: Targets, objective: Objective
) -> TeacherView:
    if isinstance(target, TopKTargets):
        shared = objective.tokens_shared(batch.domain, model.hf.shape.vocab_size)
        return view_of_top_k(target, batch.labels, shared)
    head = objective.head_of(batch.domain)
    assert head is not None
    return teacher_view(
        target.hidden,
        head.weight,
        batch.labels,
        vocab_size=head.vocab_size,
        tp_group=model.groups.pg.tp,
        chunk_size=objective.loss.chunk_size or None,
    )


def view_of_top_k(target: TopKTargets, labels: Tensor, vocab_size: int) -> TeacherView:
    """Of a teacher that names k tokens: what they leave over lies evenly on all others. At the
    loss's temperature, which is the targets'."""
    logprobs = target.logprobs.double()
    others = max(vocab_size - logprobs.shape[1], 1)
    rest = (1.0 - logprobs.exp().sum(1)).clamp(min=torch.finfo(torch.float32).tiny) / others
    named = target.ids == labels[:, None]
    label = torch.where(named, logprobs, 0.0).sum(1).where(named.any(1), rest.log())
    best = logprobs.topk(min(2, logprobs.shape[1]), dim=1).values
    second = best[:, 1] if best.shape[1] > 1 else rest.log()
    return TeacherView(label, best[:, 0] - second)


def _count(weights: Tensor) -> Tensor:
    return weights.new_tensor(float(len(weights)))
