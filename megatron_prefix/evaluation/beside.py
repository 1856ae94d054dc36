"""Evaluations beside training: servers of their own hold the weights of one step and answer, while
the trainer goes on. One at a time; each is entered under the step whose weights answered.

The weights of a step that training has left are nowhere else: where they are lost, with a server
or at a stop, another evaluation is made in their place, of the weights that there are then.
"""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_prefix.orders import Order
from megatron_prefix.rollout.pool import Roster
from megatron_prefix.rollout.protocol import ServerUnavailable, SglangError
from megatron_prefix.run_files.log import Evaluation

_MOST_LOST = 3  # evaluations in a row, before no other is made in their place
WAIT_S = 1.0  # between two orders while one waits for answers, or for a server


class Answered(Evaluation, Protocol):
    """An evaluation with what it costs."""

    @property
    def lengths(self) -> Sequence[tuple[int, int]]: ...  # prompt and sampled tokens, by answer


class Evaluator(Protocol):
    def __call__(self, step: int, policy_version: int, roster: Roster | None) -> Answered:
        """Greedy answers of the servers that ``roster`` lets be asked; None: the run's own."""


class ServerFleet(Protocol):
    """What is asked here of the servers that ``rollout/fleet.py`` keeps."""

    @property
    def members(self) -> Sequence[object]: ...  # that may be asked

    def usable(self) -> Sequence[str]: ...

    def in_step(self, version: int) -> bool: ...

    def expect(self) -> None: ...

    def lose(self, url: str, why: SglangError) -> None: ...

    def tell_to(self, tell: Callable[[str], None]) -> None: ...


class Journal(Protocol):
    """Where results and losses are told."""

    def evaluated(self) -> set[int]:
        """The steps whose evaluation is entered."""

    def enter_evaluation(self, step: int, result: Answered) -> None: ...

    def tell_of_evaluations(self, words: str) -> None: ...


class Pinned:
    """The roster of one evaluation: its servers hold ``version`` until it ends. The fleet, which
    may publish other weights, hears of those that failed afterwards."""

    def __init__(self, urls: Sequence[str], version: int) -> None:
        self._urls, self._version = tuple(urls), version
        self.lost: dict[str, SglangError] = {}

    def usable(self) -> Sequence[str]:
        return [url for url in self._urls if url not in self.lost]

    def version(self, url: str) -> int:
        return self._version

    def lose(self, url: str, why: SglangError) -> None:
        self.lost[url] = why

    def waiting(self) -> None:
        """Training does not wait for it."""


@dataclass(frozen=True)
class _Running:
    step: int
    roster: Pinned
    answers: concurrent.futures.Future[Answered]


class SideEvaluations:
    """Rank 0's. Its methods are called between steps, and none of them waits for answers longer
    than ``WAIT_S``, but for :meth:`stop`."""

    def __init__(self, evaluate: Evaluator, fleet: ServerFleet, journal: Journal) -> None:
        self._evaluate, self._fleet, self._journal = evaluate, fleet, journal
        self._running: _Running | None = None
        self._owed = False  # one was lost
        self._lost = 0  # in a row

    def resume(self, owed: bool) -> None:
        """``owed``: the last that was due has no entry."""
        self._owed = owed

    def look(self, step: int, policy_version: int) -> Order | None:
        """After ``step`` steps, before the next: enters what has finished, and makes up for what
        was lost. None: go on; training waits for no server of ours."""
        self._collect(0.0)
        if not self._owed or self._running:
            return None
        order = self.begin(step, policy_version)
        return order if order.kind == "sync_evaluation" else None

    def begin(self, step: int, policy_version: int) -> Order:
        """Evaluate the weights after ``step``, once the evaluation before is done."""
        self._collect(WAIT_S)
        if self._running:
            return Order("wait")
        self._owed = step not in self._journal.evaluated()
        if not self._owed:
            return Order("nothing")
        if not self._fleet.in_step(policy_version):
            if self._fleet.members:
                return Order("sync_evaluation")
            self._owed = self._may_return(step)
            return Order("nothing")
        roster = Pinned(self._fleet.usable(), policy_version)
        answers = _in_thread(lambda: self._evaluate(step, policy_version, roster))
        self._running, self._owed = _Running(step, roster, answers), False
        return Order("nothing")

    def finish(self, step: int, policy_version: int) -> Order:
        """At the end of training: ``nothing`` once every evaluation is entered."""
        self._collect(WAIT_S)
        order = self.begin(step, policy_version) if self._owed else Order("nothing")
        if order.kind != "nothing" or not (self._running or self._owed):
            return order
        if not self._running:  # no server is back yet
            time.sleep(WAIT_S)
        return Order("wait")

    def stop(self, patience_s: float) -> None:
        """The run ends early, and is saved: what answers within ``patience_s`` is entered."""
        self._collect(patience_s)
        if self._running:
            self._journal.tell_of_evaluations(
                f"the evaluation after step {self._running.step} was not done within "
                f"eval.stop_wait_s={patience_s:g}; the resumed run makes another in its place"
            )

    def _may_return(self, step: int) -> bool:
        """Whether a server can be expected to be back."""
        try:
            self._fleet.expect()
        except ServerUnavailable as error:
            self._journal.tell_of_evaluations(f"no evaluation of step {step}: {error}")
            return False
        return True

    def _collect(self, wait_s: float) -> None:
        """Enters the running evaluation if it ends within ``wait_s``. Raises what is no fault of a
        server, as a scorer's error."""
        running = self._running
        if running is None:
            return
        done, _ = concurrent.futures.wait([running.answers], wait_s)
        if not done:
            return
        self._running = None
        for url, why in running.roster.lost.items():
            self._fleet.lose(url, why)
        error = running.answers.exception()
        if isinstance(error, SglangError):
            self._lost += 1
            self._owed = self._lost <= _MOST_LOST
            then = "another is made in its place" if self._owed else "no other is made in its place"
            self._journal.tell_of_evaluations(
                f"the evaluation after step {running.step} is lost, {then}: {error}"
            )
            return
        self._lost = 0
        self._journal.enter_evaluation(running.step, running.answers.result())


def _in_thread(answer: Callable[[], Answered]) -> concurrent.futures.Future[Answered]:
    """In a daemon thread: a run that ends waits for no answer."""
    future: concurrent.futures.Future[Answered] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(answer())
        except Exception as error:  # noqa: BLE001 - raised or told where the future is read
            future.set_exception(error)

    threading.Thread(target=run, name="evaluation", daemon=True).start()
    return future
