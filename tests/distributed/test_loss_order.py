"""Collectives of the loss travel under GEMMs of other chunks: by the order in which it starts work
and waits for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.loss import chunks, gemm, prefix_divergence
from tests.distributed.ranks import run_ranks
from tests.unit.loss.reference import make_case

CHUNK, POSITIONS = 13, 37
LAST = 2  # of three chunks
STATISTICS, SUMS, HIDDEN = "statistics", "sums", "hidden gradient"


@dataclass(frozen=True)
class Event:
    """A chunk's GEMM or collective is started, or the collective is waited for."""

    what: str  # gemm, or a collective's name
    chunk: int
    waits: bool = False


class _Handle:
    """Of a collective under way: writes down when it is waited for."""

    def __init__(self, work: dist.Work, waited: Callable[[], None]) -> None:
        self._work, self._waited = work, waited

    def wait(self) -> None:
        self._waited()
        self._work.wait()


class _Recorder:
    """Stands in front of the loss's GEMMs and collectives, in a process that ends after."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        for name, place in (
            ("logits_into", 1),
            ("hidden_gradient_into", 0),
            ("add_weight_gradient", 2),
        ):
            setattr(gemm, name, self._noted(getattr(gemm, name), place))
        self._gather, self._reduce = chunks.start_all_gather, dist.all_reduce
        chunks.start_all_gather = self._start_all_gather
        dist.all_reduce = self._all_reduce

    def _noted(self, product: Callable[..., None], place: int) -> Callable[..., None]:
        def noted(*matrices: Tensor) -> None:
            self.events.append(Event("gemm", _chunk_of(matrices[place])))
            product(*matrices)

        return noted

    def _start_all_gather(self, own: Tensor, group: Any) -> tuple[Tensor, _Handle]:
        what = STATISTICS if own.shape[1] >= 4 else SUMS
        # Each kind is sent in the order of the chunks.
        chunk = sum(event.what == what and not event.waits for event in self.events)
        everyone, work = self._gather(own, group)
        return everyone, self._started(what, chunk, work)

    def _all_reduce(self, out: Tensor, **settings: Any) -> _Handle:
        return self._started(HIDDEN, _chunk_of(out), self._reduce(out, **settings))

    def _started(self, what: str, chunk: int, work: Any) -> _Handle:
        self.events.append(Event(what, chunk))
        return _Handle(work, lambda: self.events.append(Event(what, chunk, waits=True)))


def _chunk_of(rows: Tensor) -> int:
    """By where a chunk's positions begin in a matrix [N, d]."""
    return rows.storage_offset() // rows.shape[1] // CHUNK


def order(divergence: str, sequence_parallel: bool) -> list[Event]:
    recorder, case, rank = _Recorder(), make_case(POSITIONS, rows=204), dist.get_rank()
    result = prefix_divergence(
        case.student_hidden.requires_grad_(),
        case.student_weight.chunk(2)[rank].clone().requires_grad_(),
        case.teacher_hidden,
        case.teacher_weight.chunk(2)[rank].clone(),
        case.token_weight,
        divergence,
        vocab_size=203,
        tp_group=dist.group.WORLD,
        chunk_size=CHUNK,
        sequence_parallel=sequence_parallel,
    )
    result.loss.backward()
    assert torch.isfinite(result.loss)
    return recorder.events


def under(events: list[Event], collective: Event) -> set[int]:
    """Chunks of the GEMMs that are started while the collective travels."""
    start = events.index(collective)
    end = events.index(Event(collective.what, collective.chunk, waits=True))
    return {event.chunk for event in events[start:end] if event.what == "gemm"}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_each_collective_travels_under_another_chunks_gemm(
    divergence: str, sequence_parallel: bool
) -> None:
    events, other = run_ranks(2, order, divergence, sequence_parallel)
    assert events == other
    started = [event for event in events if event.what != "gemm" and not event.waits]
    assert sum(event.what == "gemm" for event in events) == 4 * (LAST + 1)
    wanted = [STATISTICS] + [SUMS] * (divergence == "jsd") + [HIDDEN] * (not sequence_parallel)
    for what in wanted:
        assert [event.chunk for event in started if event.what == what] == [0, 1, LAST]
    assert len(started) == len(wanted) * (LAST + 1)
    for collective in started:
        others = under(events, collective) - {collective.chunk}
        # Of the last chunk only the statistics find another one's: behind it none is left.
        if collective.chunk < LAST or collective.what == STATISTICS:
            assert others, collective


def _word(event: Event) -> str:
    if event.what == "gemm":
        return str(event.chunk)
    return f"{event.what[:3]}{event.chunk}{'!' if event.waits else ''}"


def test_the_order_of_a_whole_call() -> None:
    """A number is a GEMM of that chunk; sta0 is sent out there and waited for at sta0!."""
    events, _ = run_ranks(2, order, "jsd", False)
    short = [
        str(event.chunk)
        if event.what == "gemm"
        else f"{event.what[:3]}{event.chunk}{'!' * event.waits}"
        for event in events
    ]
    assert " ".join(short) == (
        "0 0 sta0 "
        "1 sta0! sum0 1 sta1 sum0! 0 hid0 0 "
        "2 sta1! sum1 2 sta2 sum1! 1 hid1 1 "
        "sta2! sum2 sum2! 2 hid2 2 hid0! hid1! hid2!"
    )
