"""Ranks that make no progress: real processes, that sleep, spin inside the interpreter, or stop."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_prefix.exit_codes import HUNG
from megatron_prefix.health.watchdog import (
    Watchdog,
    hang_found,
    hang_report,
    longest_wait,
    patience,
)

RANK = """
import sys, time
from pathlib import Path
from megatron_prefix.health.watchdog import Watchdog
folder, rank, timeout_s = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
def stuck_in_the_middle(seconds):
    time.sleep(seconds)
with Watchdog(folder, rank, timeout_s) as watchdog:
    print("ready", flush=True)
    for step in range(5):
        watchdog.beat(f"student of step {step}")
        time.sleep(0.05)
    stuck_in_the_middle(float(sys.argv[4]))
"""
COUNT = """
    for _ in range(40):
        time.sleep(0.05)
    print(watchdog.stood_still(), watchdog.stood_still())
"""


def start(folder: Path, rank: int, timeout_s: float, sleep_s: float) -> subprocess.Popen[bytes]:
    words = [str(folder), str(rank), str(timeout_s), str(sleep_s)]
    process = subprocess.Popen([sys.executable, "-c", RANK, *words], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def stacks(folder: Path, rank: int) -> str:
    return (folder / "logs" / "stacks" / f"rank_{rank}.txt").read_text()


def test_one_rank_that_hangs_has_all_write_their_stacks_and_end(tmp_path: Path) -> None:
    waits, stopped = start(tmp_path, 1, 600, 600), start(tmp_path, 2, 600, 600)
    hangs = start(tmp_path, 0, 1.0, 600)  # last: the others heed no hang from before their start
    stopped.send_signal(signal.SIGSTOP)
    try:
        assert (hangs.wait(60), waits.wait(60)) == (HUNG, HUNG)
    finally:
        for process in (hangs, waits, stopped):
            process.kill()
            process.wait()
    for rank in (0, 1):
        assert "in stuck_in_the_middle" in stacks(tmp_path, rank)
    report = hang_report(tmp_path)
    assert re.search(r"no progress: rank 0: student of step 4 for \d+\.\d s; rank 1: ", report)
    assert "without a word, stopped or gone: rank 2" in report
    assert "\n" not in report


def test_a_rank_that_was_stopped_writes_its_stacks_once_it_goes_on(tmp_path: Path) -> None:
    since = time.time()
    stopped, hangs = start(tmp_path, 1, 600, 600), start(tmp_path, 0, 1.0, 600)
    stopped.send_signal(signal.SIGSTOP)
    try:
        while not hang_found(tmp_path, since):
            assert hangs.poll() is None and time.time() < since + 60
            time.sleep(0.05)
        stopped.send_signal(signal.SIGCONT)
        assert (hangs.wait(60), stopped.wait(60)) == (HUNG, HUNG)
    finally:
        for process in (hangs, stopped):
            process.kill()
            process.wait()
    assert stacks(tmp_path, 1).startswith("rank 1: student of step ")
    assert "most recent call first" in stacks(tmp_path, 1)
    assert not hang_found(tmp_path, time.time())
    assert "without a word" not in hang_report(tmp_path)


def test_a_rank_that_goes_on_and_ends_is_left_alone(tmp_path: Path) -> None:
    process = start(tmp_path, 0, 2.0, 1.0)
    assert process.wait(60) == 0
    assert stacks(tmp_path, 0) == ""


def test_a_hang_of_an_earlier_start_is_over_and_its_stacks_are_kept(tmp_path: Path) -> None:
    assert start(tmp_path, 0, 0.5, 600).wait(60) == HUNG
    first = stacks(tmp_path, 0)
    time.sleep(0.1)
    assert start(tmp_path, 0, 600, 1.0).wait(60) == 0
    assert (tmp_path / "logs" / "stacks" / "rank_0.1.txt").read_text() == first


def test_time_in_which_a_process_was_stopped_is_told_and_does_not_count(tmp_path: Path) -> None:
    script = RANK.partition("    stuck")[0] + COUNT
    words = [str(tmp_path), "0", "3.0"]
    with subprocess.Popen(
        [sys.executable, "-c", script, *words], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.6)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(4.0)
        os.kill(process.pid, signal.SIGCONT)
        still, then = map(float, process.stdout.read().split())
    assert process.returncode == 0
    assert 3.0 < still < 60.0
    assert then == 0.0


def test_it_can_be_opened_and_closed_within_a_process(tmp_path: Path) -> None:
    with Watchdog(tmp_path, 0, 60.0) as watchdog:
        watchdog.beat("nothing")
        assert watchdog.stood_still() >= 0.0
    assert stacks(tmp_path, 0) == ""


def test_stacks_are_written_before_the_collectives_end_the_ranks() -> None:
    assert [patience(timeout_s) for timeout_s in (600.0, 30.0, 4.0)] == [540.0, 20.0, 2.0]


def test_no_wait_that_is_allowed_outlasts_a_watchdog() -> None:
    assert longest_wait(600.0) == 513.0
    for timeout_s in (1.0, 15.0, 40.0, 67.0, 3600.0):
        assert 0 < longest_wait(timeout_s) < patience(timeout_s) < timeout_s
