"""What a step's microbatches show of their prefix tokens, summed over all ranks."""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.loss import FiniteCheck
from megatron_prefix.types import PrefixBatch, Targets

logger = logging.getLogger(__name__)


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


class Tally:
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

    def watch(
        self, kl: Tensor, weights: Tensor, target: Targets | None, heads: dict[str, Tensor]
    ) -> None:
        """Weights and target are looked at now: they may be gone before the step ends. Heads live
        on."""
        given = {} if target is None else vars(target)
        checks = [FiniteCheck.of(f"the teacher's {name}", value) for name, value in given.items()]
        values = FiniteCheck.of("divergence", kl), FiniteCheck.of("token weights", weights)
        self._watched.append(_Watched(*values, checks, heads))

    def tell_non_finite(self) -> None:
        """Where, and in which input; waits for the device."""
        for number, watched in enumerate(self._watched):
            for problem in watched.problems():
                logger.warning("microbatch %d of this rank: %s", number, problem)

    def reduce(self, *, counts: bool) -> PrefixSums:
        """Sums over the world, the same on every rank. Ranks that hold copies (other stages, other
        tp ranks) have ``counts`` false and give zeros. Collective."""
        scalars = torch.stack([self.loss, self.diff, self.sampled, self.stops, self.stop_diff])
        sums = torch.cat([scalars, self.kl, self.tokens, self.overlap])
        if not counts:
            sums.zero_()
        dist.all_reduce(sums)
        pairs = [torch.empty_like(self.worst) for _ in range(dist.get_world_size())]
        dist.all_gather(pairs, self.worst)
        host, positions = sums.cpu(), sums[len(scalars) :].cpu().chunk(3)
        if not host.isfinite().all():
            self.tell_non_finite()
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


@dataclass(frozen=True)
class _Watched:
    """What a microbatch's loss was made of, should it not be finite."""

    divergence: FiniteCheck
    weights: FiniteCheck
    target: list[FiniteCheck]
    heads: dict[str, Tensor]

    def problems(self) -> Iterator[str]:
        """Waits for the device."""
        weights, divergence = self.weights.problem(), self.divergence.problem()
        if weights is not None:
            yield weights
        if divergence is not None:
            yield f"{divergence}: {self._origin()}"

    def _origin(self) -> str:
        """Of a divergence that is not finite."""
        checks = [*self.target, *(FiniteCheck.of(*head) for head in self.heads.items())]
        return "; ".join(filter(None, (check.problem() for check in checks))) or (
            f"{', '.join(check.name for check in checks)} are finite here, so it is the "
            "student's hidden state there, or another rank's shard"
        )


def _further_apart(a: Tensor, b: Tensor) -> Tensor:
    """The pair [2] whose halves differ more; a NaN counts as differing most."""
    apart_a, apart_b = ((pair[0] - pair[1]).abs() for pair in (a, b))
    return torch.where((apart_b > apart_a) | apart_b.isnan(), b, a)
