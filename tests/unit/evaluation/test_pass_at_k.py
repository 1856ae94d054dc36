"""pass@k against drawing every subset, and intervals against simulation."""

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prefix.evaluation.pass_at_k import (
    average,
    mean_over_problems,
    pass_at_k,
    passed,
    powers_of_two,
    wilson_interval,
)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n: int) -> None:
    for c in range(n + 1):
        answers = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(answers, k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30))
def test_avg_is_pass_at_1_and_pass_at_k_grows_with_k(right: list[int]) -> None:
    assert average(right, 8).value == pytest.approx(passed(right, 8, 1).value)
    values = [passed(right, 8, k).value for k in range(1, 9)]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[-1] == pytest.approx(sum(c > 0 for c in right) / len(right))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.sampled_from([1, 2, 6]))
def test_intervals_hold_the_value_within_0_and_1(right: list[int], k: int) -> None:
    estimate = passed(right, 6, k)
    low, high = estimate.interval
    assert 0.0 <= low <= estimate.value + 1e-12 and estimate.value <= high + 1e-12 <= 1.0 + 1e-12
    assert low < high


@given(st.lists(st.booleans(), min_size=2, max_size=60))
def test_one_answer_a_problem_gives_wilsons_interval(right: list[bool]) -> None:
    estimate = average(list(map(int, right)), 1)
    expected = wilson_interval(sum(right), len(right))
    assert estimate.interval == pytest.approx(expected, abs=1e-12)


def test_answers_that_agree_on_each_problem_count_once() -> None:
    """Eight alike answers to a problem say no more than one; eight unlike ones do."""
    alike = average([8, 0] * 20, 8)
    spread = average([4, 4] * 20, 8)
    assert alike.value == spread.value == 0.5
    assert alike.interval == pytest.approx(average([1, 0] * 20, 1).interval, abs=2e-3)
    width = [high - low for low, high in (alike.interval, spread.interval)]
    assert width[1] < 0.5 * width[0]


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    draw, covered, n, problems = random.Random(0), 0, 4, 60
    for _ in range(400):
        chances = [draw.choice((0.1, 0.5, 0.9)) for _ in range(problems)]
        right = [sum(draw.random() < chance for _ in range(n)) for chance in chances]
        low, high = average(right, n).interval
        covered += low <= 0.5 <= high
    assert 0.92 <= covered / 400 <= 0.99


def test_the_k_that_are_shown() -> None:
    assert [powers_of_two(n) for n in (1, 4, 6, 16)] == [
        [1],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8, 16],
    ]


def test_a_mean_is_a_mean() -> None:
    assert mean_over_problems([0.25, 0.75, 0.5], 4).value == pytest.approx(0.5)
    assert math.isclose(mean_over_problems([1.0], 1).value, 1.0)
