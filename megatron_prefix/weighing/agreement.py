"""Do the first tokens of a rollout ask for the same change of the student as all of them do?"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_prefix.mcore.gradients import cosine, host_copy
from megatron_prefix.mcore.optimizer import TrainableStudent
from megatron_prefix.student import Objective, forward_backward
from megatron_prefix.types import PrefixBatch, Targets
from megatron_prefix.weighing.prefix_sums import PrefixSums


@dataclass(frozen=True)
class Audit:
    sums: PrefixSums  # over all positions, as ``student.score``'s
    agreement: float  # cosine of the two gradients; NaN where one of them is zero


def audit_gradients(
    student: TrainableStudent,
    batches: Sequence[PrefixBatch],
    targets: Sequence[Targets],
    objective: Objective,
    length: int,
    prefix_length: int,
) -> Audit:
    """The gradient of the loss on the first ``prefix_length`` positions against the one on all.

    Two passes forward and backward over the same rollouts, of at most ``length`` tokens, in train
    mode: Megatron recomputes activations in no other. Weights, optimizer state and, without
    dropout, random numbers stay as they are and no gradient is left; with delayed FP8 scaling, the
    amax histories see the passes. Takes host memory of one gradient of this rank. Collective.
    """
    try:
        sums = forward_backward(student, batches, targets, objective, length)
        whole = host_copy(student)
        begun = [_before(batch, prefix_length) for batch in batches]
        forward_backward(student, begun, targets, objective, length)
        return Audit(sums, cosine(student, whole))
    finally:
        student.zero_grad()


def _before(batch: PrefixBatch, prefix_length: int) -> PrefixBatch:
    """A cosine does not depend on the denominator, which stays that of all tokens."""
    inside = batch.prefix_offsets < prefix_length
    return replace(batch, token_weight=torch.where(inside, batch.token_weight, 0.0))
