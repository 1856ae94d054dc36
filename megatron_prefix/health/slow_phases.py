"""Which phase of a step took far longer than it usually does, and which rank held it up. Pure.

In a phase with collectives all ranks take as long as the slowest one, so its time alone does not
tell which that was. What does: the seconds that a rank's process was not let run, and the time that
each rank took for one fixed piece of work of its own.

Legend: R ranks, P phases.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

_HISTORY, _FEWEST = 50, 5  # steps that a median is of; no verdict with fewer
_FACTOR, _LEAST_S = 3.0, 0.5  # above the median, in times and in seconds
_PACE = 2.0  # times the other ranks' median
_STEPS_IN_A_ROW, _STEPS_OF_SILENCE = 5, 100
ROLLOUT = "rollout"  # only rank 0 works in it, and most of it is the servers'


@dataclass(frozen=True)
class StepTimes:
    """One step of all ranks."""

    phases: tuple[str, ...]  # [P]
    seconds: np.ndarray  # float64 [R, P]
    stood_still: np.ndarray  # float64 [R]: seconds that the process was not let run
    work: np.ndarray  # float64 [R]: seconds that the fixed piece of work took
    prefix_length: int = 0  # steps of half to twice of it are compared


@dataclass(frozen=True)
class Verdict:
    """One line on what was far slower than usual; no words: nothing was."""

    words: str = ""
    phase: str = ""  # empty: no phase, but all the work of a rank
    rank: int = -1  # that held it up; below 0: none alone


class SlowPhases:
    """Sees every step; ``hosts`` [R] are the ranks' machines."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._history: dict[str, deque[tuple[int, float]]] = {}
        self._slow_work = [0] * len(hosts)  # steps in a row
        self._silent_until = 0

    def judge(self, step: int, times: StepTimes) -> Verdict:
        """The phase that lost most time, or a rank that is slow all the time."""
        worst, slowest = 0.0, Verdict()
        for place, phase in enumerate(times.phases):
            took = float(times.seconds[:, place].max())
            history = self._history.setdefault(phase, deque(maxlen=_HISTORY))
            length = times.prefix_length
            alike = [s for other, s in history if other <= 2 * length and length <= 2 * other]
            usual = median(alike) if len(alike) >= _FEWEST else float("inf")
            history.append((length, took))
            excess = took - usual
            if took > _FACTOR * usual and excess > max(_LEAST_S, worst):
                rank, why = self._culprit(times, place, excess)
                words = f"{phase} took {took:.2f} s, {took / usual:.1f} times its median: {why}"
                worst, slowest = excess, Verdict(words, phase, rank)
        return slowest if slowest.words else self._slow_rank(step, times)

    def _culprit(self, times: StepTimes, place: int, excess: float) -> tuple[int, str]:
        stopped = int(times.stood_still.argmax())
        if times.stood_still[stopped] > excess / 2:
            seconds = f"{times.stood_still[stopped]:.1f} s"
            return stopped, f"{self._name(stopped)} was not let run for {seconds}"
        if times.phases[place] == ROLLOUT:
            return -1, "rank 0 waited for the servers"
        ratios = _ratios(times.work)
        slow = int(ratios.argmax())
        if ratios[slow] > _PACE:
            share = f"{ratios[slow]:.1f} times the others' time for work"
            return slow, f"{self._name(slow)} needs {share}"
        own = times.seconds[:, place]
        last = int(own.argmax())
        if len(own) == 1 or own[last] - float(np.median(np.delete(own, last))) > excess / 2:
            return last, f"on {self._name(last)}"
        return -1, "on all ranks alike"

    def _slow_rank(self, step: int, times: StepTimes) -> Verdict:
        """A rank that is always slow has slow medians: it is compared with the others."""
        ratios = _ratios(times.work)
        for rank, ratio in enumerate(ratios):
            self._slow_work[rank] = self._slow_work[rank] + 1 if ratio > _PACE else 0
        slow = int(ratios.argmax())
        if self._slow_work[slow] < _STEPS_IN_A_ROW or step < self._silent_until:
            return Verdict()
        self._silent_until = step + _STEPS_OF_SILENCE
        words = (
            f"{self._name(slow)} has needed {ratios[slow]:.1f} times the others' time for the same "
            f"work, {self._slow_work[slow]} steps in a row"
        )
        return Verdict(words, rank=slow)

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._hosts[rank]})"


def _ratios(work: np.ndarray) -> np.ndarray:
    """Each rank's time over the median of the others' [R]; 1 for a lone rank."""
    count = len(work) - 1
    if not count:
        return np.ones(1)
    rising, place_R = np.sort(work), work.argsort().argsort()

    def of_the_others(k: int) -> np.ndarray:  # their k-th time [R]: sorted once for all ranks
        return np.where(k < place_R, rising[k], rising[k + 1])

    medians_R = (of_the_others((count - 1) // 2) + of_the_others(count // 2)) / 2
    return work / np.maximum(medians_R, 1e-9)
