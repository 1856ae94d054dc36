"""The processes of a tool that torchrun started, on one machine or several; or the only one."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_prefix.mcore.folders import new_folder


@dataclass(frozen=True)
class Crew:
    """The processes that share a conversion, and which of them this is. Methods are collective."""

    rank: int = 0
    size: int = 1

    def each[T](self, work: Callable[[], T]) -> list[T]:
        """The picklable results of all, by rank, on all. The first rank's ValueError or OSError is
        raised on all alike."""
        answer = _attempt(work)
        answers: list[Any] = [answer]
        if self.size > 1:
            answers = [None] * self.size
            dist.all_gather_object(answers, answer)
        for _, error in answers:
            if error is not None:
                raise error
        return [value for value, _ in answers]

    def alike[T](self, work: Callable[[], T]) -> T:
        """Done by every rank for itself, as reading what all should see; what one of them cannot
        do is told by all. The results stay where they are."""
        own: list[T] = []
        self.each(lambda: own.append(work()))
        return own[0]

    def lead[T](self, work: Callable[[], T]) -> T:
        """Done by rank 0 alone, while the others wait; its result on all."""
        found = self.each(lambda: work() if self.rank == 0 else None)[0]
        return found  # type: ignore[return-value]

    @contextlib.contextmanager
    def new_folder(self, final: Path) -> Iterator[Path]:
        """As ``folders.new_folder``, one for all ranks, on a disk that all see."""
        with contextlib.ExitStack() as stack:
            yield self.lead(lambda: stack.enter_context(new_folder(final)))
            self.lead(stack.close)


def _attempt[T](work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except (ValueError, OSError) as error:
        return None, error


@contextlib.contextmanager
def torchrun_crew() -> Iterator[Crew]:
    """The world that torchrun set up, joined over gloo; without torchrun a crew of one."""
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield Crew()
        return
    dist.init_process_group("gloo")
    try:
        dist.barrier()  # one that refuses at once would leave while others still connect
        yield Crew(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
