"""Seconds by phase of a step: disjoint, measured on the host."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Phases:
    """A stopwatch for one step. ``synchronize`` is called at each phase's end (a GPU's queue),
    ``begins`` with each phase's name before it."""

    def __init__(
        self,
        synchronize: Callable[[], None] = lambda: None,
        begins: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._synchronize, self._begins = synchronize, begins
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._begins(name)
        start = time.perf_counter()
        yield
        self._synchronize()
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def carve(self, name: str, parts: Mapping[str, float]) -> None:
        """Seconds of the phase ``name`` that go by other names."""
        for part, seconds in parts.items():
            self._seconds[name] -= seconds
            self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        """By phase, with what lies between them as ``other``."""
        total = time.perf_counter() - self._start
        return {**self._seconds, "other": total - sum(self._seconds.values())}
