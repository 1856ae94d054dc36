"""What the tensor-parallel ranks must have in common, made sure of before they meet.

A rank that refuses its call, or comes with another number of positions, would leave the others
waiting in a collective of another size for ever. So each call begins with one all-gather of eight
bytes: a digest of everything that decides which collectives follow. Only where the digests differ
do the ranks tell each other why.
"""

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prefix.loss.gather import start_all_gather

_REFUSED = -1


class Agreement:
    """The exchange of one call, under way from its making; the call's own work may begin."""

    def __init__(
        self,
        facts: Mapping[str, object],
        refusal: Exception | None,
        group: ProcessGroup,
        device: torch.device,
    ) -> None:
        """``facts``, in one order everywhere, must be the same on all ranks; ``refusal``: what is
        wrong with this rank's call by itself, or None."""
        self._facts, self._group = dict(facts), group
        self._cause = refusal
        self._refusal = None if refusal is None else _in_words(refusal)
        digest = _REFUSED if refusal else _digest(self._facts)
        # Filled on the device: a copy from the host could wait for it.
        self._own = torch.full((1,), digest, dtype=torch.int64, device=device)
        self._everyone, self._handle = start_all_gather(self._own, group)
        if device.type == "cuda":
            # The answer travels on a stream of its own: reading it here must not wait for the
            # GEMMs that the caller queues meanwhile.
            self._stream = torch.cuda.Stream(device)
            with torch.cuda.stream(self._stream):
                self._handle.wait()
                self._host = self._everyone.to("cpu", non_blocking=True)
            self._everyone.record_stream(self._stream)

    def confirm(self) -> None:
        """Raises ValueError, with the same words on all ranks, where they do not agree."""
        digests = self._answer().flatten().tolist()
        if digests[0] == _REFUSED or len(set(digests)) > 1:
            raise ValueError(self._explain()) from self._cause

    def _answer(self) -> Tensor:
        if self._everyone.is_cuda:
            self._stream.synchronize()
            return self._host
        self._handle.wait()
        return self._everyone

    def _explain(self) -> str:
        told: list[tuple[str | None, dict[str, object]]] = [(None, {})] * self._group.size()
        dist.all_gather_object(told, (self._refusal, self._facts), group=self._group)
        refusals = [refusal for refusal, _ in told]
        rank = next((rank for rank, refusal in enumerate(refusals) if refusal), None)
        if rank is not None:
            alike = len(set(refusals)) == 1
            return f"{'' if alike else f'tensor-parallel rank {rank}: '}{refusals[rank]}"
        first = told[0][1]
        name, rank, other = next(
            (name, rank, facts.get(name, "nothing"))
            for name in first
            for rank, (_, facts) in enumerate(told)
            if facts.get(name, "nothing") != first[name]
        )
        return (
            f"{name} is {first[name]} on tensor-parallel rank 0 and {other} on rank {rank}; give "
            "all ranks of the group the same"
        )


def _in_words(refusal: Exception) -> str:
    """One line; of what nobody foresaw also its kind."""
    if isinstance(refusal, ValueError):
        return str(refusal)
    first = next(iter(str(refusal).splitlines()), "")
    return f"{type(refusal).__name__}: {first}; see this rank's traceback"


def _digest(facts: Mapping[str, object]) -> int:
    text = repr(facts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest())
