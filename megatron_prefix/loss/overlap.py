"""How far student and teacher agree on what may come next: the share of their k likeliest tokens
that both have, at each prefix position, from the logits that the divergence makes anyway.

Legend: N prefix positions, C positions of a chunk, V this rank's real vocabulary rows, R
tensor-parallel ranks.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prefix.loss.gather import all_gather


class TopKOverlap:
    """Filled by one call of the loss; :meth:`shares` then brings the ranks together."""

    def __init__(self, k: int, positions: int, vocab_size: int, device: torch.device) -> None:
        self._k = min(k, vocab_size)
        # Of student and teacher: this rank's likeliest logits, and the tokens that they are of.
        self._logits = torch.full((2, positions, self._k), -torch.inf, device=device)
        self._ids = torch.full((2, positions, self._k), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def take(self, positions: slice, student: Tensor, teacher: Tensor, first_row: int) -> None:
        """Raw logits fp32 [C, V] of a chunk, before a pass changes them."""
        count = min(self._k, student.shape[1])
        for model, logits in enumerate((student, teacher)):
            best = logits.topk(count, dim=1)
            self._logits[model, positions, :count] = best.values
            self._ids[model, positions, :count] = best.indices + first_row

    @torch.no_grad()
    def shares(self, tp_group: ProcessGroup | None) -> Tensor:
        """fp32 [N], 0 to 1, the same on all ranks of the group. Collective over it. Which of tied
        tokens is among the k likeliest is left open."""
        logits, ids = self._of_all_ranks(tp_group)
        best = logits.topk(self._k, dim=-1).indices
        student, teacher = ids.gather(-1, best)
        both = (student[:, :, None] == teacher[:, None, :]).any(-1)
        return both.sum(-1) / self._k

    def _of_all_ranks(self, group: ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """Both of [2, N, R k], in rank order."""
        if group is None or group.size() == 1:
            return self._logits, self._ids
        parts = []
        for own in (self._logits, self._ids):
            parts.append(all_gather(own, group).permute(1, 2, 0, 3).flatten(2))
        return parts[0], parts[1]
