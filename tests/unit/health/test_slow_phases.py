"""Verdicts on made-up times: which phase, how much slower, and whose fault."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_prefix.health.slow_phases import SlowPhases, StepTimes, Verdict, _ratios

HOSTS = ("node1", "node1", "node2")
PHASES = ("rollout", "student", "sync")


def times(student: list[float], rollout: float = 1.0, still: int = -1, slow: int = -1) -> StepTimes:
    """``still``: the rank that stood still for 4 s; ``slow``: the one that works at a third."""
    seconds = np.array([[rollout, own, 0.1] for own in student])
    stood = np.array([4.0 if rank == still else 0.0 for rank in range(3)])
    work = np.array([0.003 if rank == slow else 0.001 for rank in range(3)])
    return StepTimes(PHASES, seconds, stood, work)


def verdicts(*steps: StepTimes) -> list[str]:
    judge = SlowPhases(HOSTS)
    for step in range(1, 7):
        assert judge.judge(step, times([0.5, 0.5, 0.5])) == Verdict()
    return [judge.judge(step, each).words for step, each in enumerate(steps, start=7)]


@pytest.mark.parametrize(
    ("slow", "words"),
    [
        (
            times([5, 5, 5], still=2),
            "student took 5.00 s, 10.0 times its median: rank 2 (node2) was",
        ),
        (times([5, 5, 5], slow=1), "rank 1 (node1) needs 3.0 times the others' time for work"),
        (times([0.5, 5, 0.5]), "10.0 times its median: on rank 1 (node1)"),
        (times([5, 5, 5]), "10.0 times its median: on all ranks alike"),
        (times([0.5] * 3, rollout=9.0), "rollout took 9.00 s, 9.0 times its median: rank 0 waited"),
    ],
)
def test_one_line_names_the_phase_and_the_rank(slow: StepTimes, words: str) -> None:
    (line,) = verdicts(slow)
    assert words in line and "\n" not in line


def test_the_phase_that_lost_most_is_named_and_the_next_step_is_judged_anew() -> None:
    first, second = verdicts(times([5, 5, 5], rollout=20.0), times([0.5, 0.5, 0.5]))
    assert first.startswith("rollout took 20.00 s")
    assert second == ""


def test_little_and_unsure_is_not_told() -> None:
    assert verdicts(times([0.9, 0.9, 0.9])) == [""], "less than three times"
    judge = SlowPhases(HOSTS)
    steps = (times([0.001] * 3), times([9.0] * 3))
    assert [judge.judge(n, each) for n, each in enumerate(steps)] == [Verdict()] * 2, "no median"
    fast = SlowPhases(HOSTS)
    short = [times([0.01 if step < 9 else 0.2] * 3) for step in range(10)]
    lines = [fast.judge(step, each) for step, each in enumerate(short)]
    assert lines == [Verdict()] * 10, "twenty times as long, and 0.2 s"


def test_a_rank_that_is_always_slow_is_told_once_in_a_while() -> None:
    lines = verdicts(*[times([0.5, 0.5, 0.5], slow=2)] * 110)
    told = [place for place, line in enumerate(lines) if line]
    assert told == [4, 104]
    assert "rank 2 (node2) has needed 3.0 times" in lines[4] and "5 steps in a row" in lines[4]


@pytest.mark.parametrize("ranks", [2, 3, 6, 7])
def test_a_rank_is_compared_with_the_median_of_the_others(ranks: int) -> None:
    for seed in range(20):
        work = np.random.default_rng(seed).integers(1, 6, ranks) * 1e-3  # with ties
        others = [np.median(np.delete(work, rank)) for rank in range(ranks)]
        np.testing.assert_allclose(_ratios(work), work / others)


def test_a_lone_rank_has_nobody_to_be_compared_with() -> None:
    judge = SlowPhases(["here"])
    for step in range(6):
        judge.judge(step, StepTimes(("student",), np.array([[1.0]]), np.zeros(1), np.ones(1)))
    line = judge.judge(6, StepTimes(("student",), np.array([[9.0]]), np.zeros(1), np.ones(1)))
    assert line == Verdict(
        "student took 9.00 s, 9.0 times its median: on rank 0 (here)", "student", 0
    )


def test_a_longer_prefix_takes_longer_and_is_compared_with_its_like() -> None:
    judge, lines = SlowPhases(HOSTS), []
    for step in range(80):
        long = step % 8 == 7
        each = times([0.5] * 3, rollout=6.0 if long else 1.0)
        lines.append(judge.judge(step, replace(each, prefix_length=75 if long else 9)))
    assert lines == [Verdict()] * 80
    slow = replace(times([0.5] * 3, rollout=20.0), prefix_length=75)
    assert "rollout took 20.00 s, 3.3 times its median" in judge.judge(80, slow).words
