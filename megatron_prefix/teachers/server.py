"""A teacher behind SGLang servers, for models that Megatron-Core cannot hold: its likeliest tokens
at each prefix position, brought to the ranks of the student's last stage.

The first tensor-parallel rank of each replica's last stage asks for its own microbatches, all of a
step at once, and its neighbours get them from it as they are used: so a step's top k crosses the
network once, whatever the student's layout, and the servers work while the student computes.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import torch
import torch.distributed as dist

from megatron_prefix.batch import MicrobatchPlan, passages_of, prefix_count
from megatron_prefix.loss.checks import check_top_k_values
from megatron_prefix.mcore.groups import ModelGroups
from megatron_prefix.rollout.protocol import SglangError
from megatron_prefix.rollout.scorer import Scorer
from megatron_prefix.rollout.scoring import Passage, TopRows, Vocabulary, common_top_k
from megatron_prefix.teacher import TeacherLost
from megatron_prefix.types import Rollout, TopKTargets

logger = logging.getLogger(__name__)
_FAILED = -1  # in place of the tokens a position: whoever asked got no answer


class ServerTeacher:
    """On the student's ranks. ``scorer`` is there on those that ask, None on the others."""

    def __init__(
        self,
        scorer: Scorer | None,
        student: ModelGroups,
        vocabulary: Vocabulary,
        top_k: int,
        device: torch.device,
        domain: str = "",
    ) -> None:
        self._scorer, self._student, self._device = scorer, student, device
        self._vocabulary, self._top_k, self._domain = vocabulary, top_k, domain

    def targets(self, rollouts: Sequence[Rollout], plan: MicrobatchPlan) -> Iterator[TopKTargets]:
        """Asks at once; each microbatch's are waited for when they are taken."""
        groups = self._student
        replica = plan.of_replica(groups.dp_rank, groups.layout.dp)
        own = [m for m in replica if plan.domain(m) == self._domain]
        if not groups.is_last_stage:
            return iter(())
        asked = [self._ask(passages_of(rollouts, plan, m)) for m in own]
        sizes = [prefix_count(rollouts, plan, m) for m in own]
        return (self._take(*each) for each in zip(own, asked, sizes, strict=True))

    def _ask(self, passages: Sequence[Passage]) -> Future[list[TopRows]] | None:
        if self._scorer is None or not passages:
            return None
        try:
            self._vocabulary.check(passages)
        except ValueError as error:  # told where the others wait for the answer
            refused: Future[list[TopRows]] = Future()
            refused.set_exception(error)
            return refused
        return self._scorer.submit(passages)

    def _take(self, microbatch: int, asked: Future[list[TopRows]] | None, size: int) -> TopKTargets:
        """One microbatch's, on all ranks of the replica's last stage."""
        if not size:
            empty = _targets(np.zeros((0, self._top_k)), np.zeros((0, self._top_k)))
            return TopKTargets(empty.ids.to(self._device), empty.logprobs.to(self._device))
        failure: Exception | None = None
        found: TopKTargets | None = None
        if asked is not None:
            try:
                found = self._found(asked.result())
            except (SglangError, ValueError) as error:
                failure = error
        found = self._shared(found, size)
        if found is None:
            words = failure or "the rank that asks the servers had no answer"
            raise TeacherLost(
                f"no top-k tokens of microbatch {microbatch} from the teacher: {words}"
            ) from failure
        return found

    def _found(self, rows: Sequence[TopRows]) -> TopKTargets:
        common = common_top_k(rows, self._vocabulary, self._top_k)
        targets = _targets(common.ids, common.logprobs)
        check_top_k_values(targets.ids, targets.logprobs, self._vocabulary.common)
        return targets

    def _shared(self, found: TopKTargets | None, size: int) -> TopKTargets | None:
        """From the rank that asked to the others of its replica's stage; None where it failed.

        The width goes first: padding of the teacher's may have made it less than the recipe's.
        Ids travel as 32 bits, 8 bytes a token with its log-probability.
        """
        device, group = self._device, self._student.pg.tp_cp
        if group.size() == 1:
            return found and TopKTargets(found.ids.to(device), found.logprobs.to(device))
        width = torch.tensor([found.ids.shape[1] if found else _FAILED], device=device)
        dist.broadcast(width, group_src=0, group=group)
        columns = int(width.item())
        if columns == _FAILED:
            return None
        parts = (
            [found.ids.int().to(device), found.logprobs.to(device)]
            if found
            else [
                torch.empty((size, columns), dtype=dtype, device=device)
                for dtype in (torch.int32, torch.float32)
            ]
        )
        for part in parts:
            dist.broadcast(part, group_src=0, group=group)
        return TopKTargets(parts[0].long(), parts[1])


def _targets(ids: np.ndarray, logprobs: np.ndarray) -> TopKTargets:
    return TopKTargets(
        torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logprobs.astype(np.float32))
    )
