"""avg@k and pass@k of answers to problems that were each asked n times, with intervals. Pure.

Legend: P problems, n answers a problem, c right ones among them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959964  # of a two-sided 95% interval


@dataclass(frozen=True)
class Estimate:
    """A mean over problems, from 0 to 1, and its 95% interval."""

    value: float
    interval: tuple[float, float]


def wilson_interval(successes: float, n: float, z: float = _Z) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson, 1927); z = 1.96 gives 95%."""
    assert 0 <= successes <= n and n > 0, f"{successes} of {n}"
    share, extra = successes / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(share * (1 - share) / n + extra / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of the n answers, drawn without replacement, hold a right one.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al., 2021 (arXiv 2107.03374, eq. 1).
    """
    assert 0 <= c <= n and 1 <= k <= n, f"n={n} c={c} k={k}"
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def average(right: Sequence[int], n: int) -> Estimate:
    """avg@n: the mean share of right answers; ``right`` [P] has the c of each problem."""
    return mean_over_problems([c / n for c in right], n)


def passed(right: Sequence[int], n: int, k: int) -> Estimate:
    """pass@k, the mean over problems; ``right`` [P] has the c of each problem."""
    return mean_over_problems([pass_at_k(n, c, k) for c in right], n)


def mean_over_problems(values: Sequence[float], n: int) -> Estimate:
    """The mean of [P] values in [0, 1], each made of n answers to one problem.

    Answers to one problem are not independent, so the problems' own spread sets the interval:
    Wilson's for p (1 - p) / (spread^2 / P) answers, the effective number of independent ones,
    held between P and n P. With n = 1 that is Wilson's interval for P answers, and where all
    problems are alike at 0 or 1 as well: nothing shows then what n answers are worth.
    """
    count = len(values)
    assert count, "a mean over no problem"
    mean = min(1.0, max(0.0, math.fsum(values) / count))
    spread = math.fsum((value - mean) ** 2 for value in values) / max(count - 1, 1)
    single = mean * (1 - mean)
    effective = single * count / spread if spread else (math.inf if single else 0.0)
    independent = float(min(max(effective, count), n * count))
    return Estimate(mean, wilson_interval(mean * independent, independent))


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... and n itself: the k that pass@k is shown for."""
    return sorted({1 << bit for bit in range(n.bit_length())} | {n})
