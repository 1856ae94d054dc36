"""Finds a run that makes no progress: each rank says what it begins, and one that has said nothing
for too long writes the stacks of all its threads, has the other ranks write theirs, and ends.

What takes long and gets on says so meanwhile. A rank that waits for rank 0 leaves it to that one
to judge how long it may be about something, and only sees to it that its process runs: rank 0's
watchdog touches a file of the run folder, its pulse.

Stacks are in ``logs/stacks/rank_N.txt`` of the run folder. A rank that is stopped, or inside a call
that holds the interpreter, writes none by itself: in the second case the C library's timer writes
them a little later; in the first it does so once somebody lets it go on, as the launcher of one
machine does.
"""

import contextlib
import faulthandler
import itertools
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_prefix.exit_codes import HUNG

logger = logging.getLogger(__name__)
_TICK_S = 0.25
_LATE_S = 1.0  # a tick that comes this much later: the rank was not let run
_SHARE_S = 5.0  # for the other ranks to see the mark and to write their stacks
_SHARE = 0.9  # of the collectives' timeout
_LONGEST_WAIT = 0.95  # of the watchdog's patience
_BACKUP_S = 30.0  # after which the C timer takes over
_REARM_S = 1.0  # the timer is a thread, made anew each time: not for each of a short step's phases
_MARK, _PULSE = "hang", "pulse"
_PULSES = 8  # of rank 0 within the watchdog's patience
_LOOK_AFTER = 0.25  # of the patience: whoever waits for rank 0 looks for its pulse no earlier
_QUEUE = Path("/proc/self/schedstat")  # of the main thread; nanoseconds


def patience(collective_timeout_s: float) -> float:
    """Seconds without progress after which a rank writes its stacks: the collectives' own timeout,
    which ends a rank without them, must not come before all have."""
    earlier = min(_SHARE * collective_timeout_s, collective_timeout_s - 2 * _SHARE_S)
    return max(earlier, collective_timeout_s / 2)


def longest_wait(collective_timeout_s: float) -> float:
    """Seconds that ranks may be made to wait for something outside: their watchdogs, which would
    take them for hung, must not come before it is given up."""
    return _LONGEST_WAIT * patience(collective_timeout_s)


class Watchdog:
    """One a rank. ``timeout_s`` has to exceed the longest that a rank may be about one thing, or
    wait for another that is, without a word that it gets on."""

    def __init__(self, folder: Path, rank: int, timeout_s: float) -> None:
        self._run_folder, self._folder = folder, stacks_folder(folder)
        self._rank, self._timeout_s = rank, timeout_s
        self._folder.mkdir(parents=True, exist_ok=True)
        _keep_earlier(self._folder / f"rank_{rank}.txt")
        self._file = (self._folder / f"rank_{rank}.txt").open("w")
        self._doing, self._since = "start", time.monotonic()
        self._started_at = time.time()
        self._armed_at = -math.inf
        self._stood_still, self._queued = 0.0, _seconds_queued()
        self._pulse, self._waits = self._folder / _PULSE, False
        self._pulsed_at, self._seen_pulse = -math.inf, 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self.beat("start")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()  # it may be about to set the timer once more
        faulthandler.cancel_dump_traceback_later()
        self._file.close()

    def beat(self, doing: str) -> None:
        """``doing`` begins now."""
        self._doing, self._since = doing, time.monotonic()
        if self._since - self._armed_at >= _REARM_S:
            self._armed_at = self._since
            later = self._timeout_s + _BACKUP_S
            faulthandler.dump_traceback_later(later, exit=True, file=self._file)

    def goes_on(self) -> None:
        """What was begun is not done, and gets on."""
        self.beat(self._doing)

    @contextlib.contextmanager
    def waits_for_rank_0(self) -> Iterator[None]:
        """Within, rank 0 may be about something for as long as its own watchdog lets it. On rank 0
        itself this changes nothing."""
        self._waits = self._rank != 0
        try:
            yield
        finally:
            self._waits = False
            self.goes_on()

    def stood_still(self) -> float:
        """Seconds since the last call in which this process was not let run: stopped, or its main
        thread in the queue of a core that others had."""
        seconds, self._stood_still = self._stood_still, 0.0
        before, self._queued = self._queued, _seconds_queued()
        return max(seconds, self._queued - before)

    def _watch(self) -> None:
        ticked_at = time.monotonic()
        while not self._closed.wait(_TICK_S):
            now = time.monotonic()
            late = now - ticked_at - _TICK_S
            ticked_at = now
            if late > _LATE_S:  # time that it had no use of does not count
                self._stood_still += late
                self._since += late
            elif now - self._since > self._timeout_s or self._found_by_another():
                self._end()
            elif self._rank == 0:
                self._give_pulse(now)
            elif self._waits and now - self._since > _LOOK_AFTER * self._timeout_s:
                self._look_for_pulse()

    def _give_pulse(self, now: float) -> None:
        if now - self._pulsed_at >= self._timeout_s / _PULSES:
            self._pulsed_at = now
            with contextlib.suppress(OSError):  # a disk that fails costs a pulse, not the watchdog
                self._pulse.touch()

    def _look_for_pulse(self) -> None:
        pulse = self._pulse.stat().st_mtime_ns if self._pulse.exists() else 0
        if pulse != self._seen_pulse:  # the clocks of two machines are not compared
            self._seen_pulse = pulse
            self.goes_on()

    def _found_by_another(self) -> bool:
        return hang_found(self._run_folder, self._started_at)

    def _end(self) -> None:
        seconds = time.monotonic() - self._since
        self._file.write(f"rank {self._rank}: {self._doing} for {seconds:.1f} s\n\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        (self._folder / _MARK).touch()
        time.sleep(_SHARE_S)
        logger.error("%s", hang_report(self._run_folder))
        sys.stderr.flush()
        os._exit(HUNG)


class NoWatchdog:
    """For a trainer that nobody watches."""

    def beat(self, doing: str) -> None:
        pass

    def goes_on(self) -> None:
        pass

    def waits_for_rank_0(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def stood_still(self) -> float:
        return 0.0


def _seconds_queued() -> float:
    """That this process's main thread was ready to run and was not let so far; 0 where the kernel
    does not say."""
    if not _QUEUE.exists():
        return 0.0
    return float(_QUEUE.read_text().split()[1]) / 1e9


def _keep_earlier(path: Path) -> None:
    """Stacks of an earlier start get a number."""
    if path.exists() and path.stat().st_size:
        numbers = (path.with_suffix(f".{number}.txt") for number in itertools.count(1))
        path.rename(next(name for name in numbers if not name.exists()))


def stacks_folder(folder: Path) -> Path:
    """In a run's folder."""
    return folder / "logs" / "stacks"


def hang_found(folder: Path, since: float) -> bool:
    """Whether a rank has found the run of ``folder`` hanging after ``since``, Unix time."""
    mark = stacks_folder(folder) / _MARK
    return mark.exists() and mark.stat().st_mtime > since


def hang_report(folder: Path) -> str:
    """One line on what each rank of a run that hung was about; ``folder`` is the run's."""
    stacks = stacks_folder(folder)
    files = [path for path in stacks.iterdir() if re.fullmatch(r"rank_\d+\.txt", path.name)]
    texts = {path.stem: path.read_text() for path in sorted(files)}
    heads = [text.partition("\n")[0] for text in texts.values() if re.match(r"rank \d+: ", text)]
    silent = [name.replace("_", " ") for name, text in texts.items() if not text]
    words = f"no progress: {'; '.join(heads) or 'no rank could say more'}"
    if silent:
        words += f"; without a word, stopped or gone: {', '.join(silent)}"
    return f"{words}; stacks in {stacks}"
