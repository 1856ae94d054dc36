"""What rank 0 decides and every rank does: one broadcast a step over a group for host data."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_prefix.batch import MicrobatchPlan, plan_microbatches, with_loss_tokens
from megatron_prefix.config import TrainConfig
from megatron_prefix.rollout.discarded import Lengths
from megatron_prefix.types import FinishReason, Rollout

# Longer than anything that rank 0 may be about while the others wait: watchdogs judge that.
_LONGEST_ORDER = timedelta(days=7)


@dataclass(frozen=True)
class Order:
    """One turn of the loop. ``nothing``: go on, it was rank 0's alone to do; ``sync``: send the
    servers the weights once more, then ask again; ``sync_evaluation``: the same with those that
    evaluate; ``wait``: ask again, a server or its answers are not there yet; ``done``: there are
    no more; ``error``: rank 0 failed, and every rank ends with its words."""

    kind: Literal[
        "train",
        "probe",
        "nothing",
        "save_and_stop",
        "sync",
        "sync_evaluation",
        "wait",
        "done",
        "error",
    ]
    prefix_length: int = 0
    rollouts: tuple[Rollout, ...] = ()
    message: str = ""  # of an error, or what rank 0 found
    loss_start: int = 0  # the first prefix position that the loss counts
    supervised: bool = False  # cross-entropy to the prefixes' own tokens; no teacher
    audit_length: int = 0  # of a probe: the prefix whose gradient is compared; 0: none is
    discarded: tuple[Lengths, ...] = ()  # of rollouts that were sampled and thrown away


@dataclass(frozen=True)
class _Packed:
    """Rollouts as flat arrays: pickling Python numbers one by one takes seconds at scale."""

    lengths: np.ndarray  # int64 [rollouts, 3]: prompt, prefix, teacher's prompt
    discarded: np.ndarray  # int64 [rollouts]
    ids: np.ndarray  # int64, prompt, prefix and teacher's prompt of each
    logprobs: np.ndarray  # float32
    versions: np.ndarray  # int64 [rollouts]
    prompts: np.ndarray  # int64 [rollouts]
    reasons: tuple[FinishReason, ...]
    written: np.ndarray  # bool [rollouts]
    domains: tuple[str, ...]


def microbatches(
    order: Order, train: TrainConfig, token_multiple: int, replicas: int
) -> MicrobatchPlan:
    """The order's rollouts over microbatches, the same on every rank, the teacher's included.

    ``replicas``: of the student, which take equally many: as many as a batch has, or fewer where
    the order has fewer rollouts to score, a probe's for example. The others would be padding alone.
    """
    scored = len(with_loss_tokens(order.rollouts, order.loss_start))
    needed = -(-scored // (train.micro_batch_size * replicas)) * replicas
    return plan_microbatches(
        order.rollouts,
        min(needed, train.global_batch_size // train.micro_batch_size),
        multiple=token_multiple,
        loss_start=order.loss_start,
        replicas=replicas,
    )


def order_group(timeout: timedelta, longest: timedelta = _LONGEST_ORDER) -> dist.ProcessGroup:
    """A gloo group of the world, made within ``timeout``, in which rank 0 may take its time: a wait
    for it ends after ``longest``, and before that with its process, or by the watchdogs. Collective
    over the world."""
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    # torch 2.11 has no public name for it.
    group._get_backend(torch.device("cpu"))._set_default_timeout(longest)
    return group


def share_words(act: Callable[[], str], group: dist.ProcessGroup) -> str:
    """What ``act()`` says on rank 0, on every rank, as an order that asks for nothing: whoever only
    waits for the next one, as a separate teacher's ranks do, goes on waiting."""
    return share_order(lambda: Order("nothing", message=act()), group).message


def share_order(decide: Callable[[], Order], group: dist.ProcessGroup) -> Order:
    """Rank 0's ``decide()`` on every rank. Collective over ``group``, a gloo group of the world.

    Raises RuntimeError with rank 0's words on the other ranks where it failed; rank 0 raises its
    own exception.
    """
    if dist.get_rank() != 0:
        box: list[tuple[Order, _Packed] | None] = [None]
        dist.broadcast_object_list(box, src=0, group=group)
        assert box[0] is not None
        order, packed = box[0]
        if order.kind == "error":
            raise RuntimeError(f"rank 0 failed: {order.message}")
        return replace(order, rollouts=_unpack(packed))
    try:
        order = decide()
    except Exception as error:
        _broadcast(Order("error", message=f"{type(error).__name__}: {error}"), group)
        raise
    _broadcast(order, group)
    return order


def _broadcast(order: Order, group: dist.ProcessGroup) -> None:
    bare = replace(order, rollouts=())
    dist.broadcast_object_list([(bare, _pack(order.rollouts))], src=0, group=group)


def _pack(rollouts: Sequence[Rollout]) -> _Packed:
    parts = [(r.prompt_ids, r.prefix_ids, r.teacher_prompt_ids) for r in rollouts]
    ids = [np.asarray(list(itertools.chain(*each)), np.int64) for each in parts]
    logprobs = [np.asarray(r.rollout_logprobs, np.float32) for r in rollouts]
    lengths = [tuple(map(len, each)) for each in parts]
    return _Packed(
        lengths=np.asarray(lengths, np.int64).reshape(-1, 3),
        discarded=np.asarray([r.discarded for r in rollouts], np.int64),
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int64),
        logprobs=np.concatenate(logprobs) if logprobs else np.zeros(0, np.float32),
        versions=np.asarray([r.policy_version for r in rollouts], np.int64),
        prompts=np.asarray([r.prompt_index for r in rollouts], np.int64),
        reasons=tuple(r.finish_reason for r in rollouts),
        written=np.asarray([r.written for r in rollouts], bool),
        domains=tuple(r.domain for r in rollouts),
    )


def _unpack(packed: _Packed) -> tuple[Rollout, ...]:
    ids, logprobs = memoryview(packed.ids), memoryview(packed.logprobs)
    rollouts, at, scored = [], 0, 0
    for index, (prompt, prefix, teacher) in enumerate(packed.lengths.tolist()):
        sampled, end = at + prompt, at + prompt + prefix
        rollouts.append(
            Rollout(
                prompt_ids=ids[at:sampled],
                prefix_ids=ids[sampled:end],
                rollout_logprobs=logprobs[scored : scored + prefix],
                finish_reason=packed.reasons[index],
                policy_version=int(packed.versions[index]),
                prompt_index=int(packed.prompts[index]),
                written=bool(packed.written[index]),
                teacher_prompt_ids=ids[end : end + teacher],
                domain=packed.domains[index],
                discarded=int(packed.discarded[index]),
            )
        )
        at, scored = end + teacher, scored + prefix
    return tuple(rollouts)
