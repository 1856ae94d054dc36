"""Token weights from the teacher's view: against loops that say the same in plain words."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.config import TokenWeightConfig
from megatron_prefix.loss.teacher_view import teacher_view
from megatron_prefix.weighing.token_weights import (
    change_point,
    raw_weights,
    reward_weights,
    rollout_starts,
)

# No two means of these differ by less than the loop below can tell apart.
HUNDREDTHS = st.integers(0, 400).map(lambda hundredths: hundredths / 100)
DRIFTS = st.lists(st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=20), max_size=5)


def packed(rollouts: list[list[float]], first: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets and values of rollouts one after another."""
    offsets = [first + place for rollout in rollouts for place in range(len(rollout))]
    values = [value for rollout in rollouts for value in rollout]
    return torch.tensor(offsets, dtype=torch.int64), torch.tensor(values, dtype=torch.float64)


@settings(deadline=None)
@given(DRIFTS, st.floats(0.5, 20.0), st.floats(0.01, 1.0), st.integers(0, 3))
def test_discrepancy_weighs_by_the_drift_of_the_tokens_before(
    rollouts: list[list[float]], scale: float, floor: float, first: int
) -> None:
    config = TokenWeightConfig("discrepancy", scale=scale, floor=floor)
    offsets, drift = packed(rollouts, first)
    teacher = torch.full_like(drift, -1.5)
    weights = raw_weights(config, offsets, (teacher + drift).float(), teacher, teacher)
    expected = []
    for rollout in rollouts:
        for place in range(len(rollout)):
            before = max(math.fsum(rollout[:place]), 0.0)
            expected.append(max(floor, math.exp(-before / scale)))
    torch.testing.assert_close(
        weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6
    )


def test_tokens_that_no_server_sampled_have_not_drifted() -> None:
    offsets, teacher = packed([[-9.0, -9.0, -9.0]])
    student = torch.tensor([math.nan, math.nan, math.nan])
    config = TokenWeightConfig("discrepancy")
    assert raw_weights(config, offsets, student, teacher, teacher).tolist() == [1.0, 1.0, 1.0]


def test_a_constant_signal_has_no_change_point() -> None:
    """Its mean differs from it by a rounding."""
    constant = torch.full((3,), 1.7761092802526828, dtype=torch.float64)
    assert constant.mean() != constant[0]
    assert change_point(constant, 1, 1.0) == 3


@settings(deadline=None)
@given(st.lists(HUNDREDTHS, min_size=1, max_size=40), st.integers(1, 8))
def test_a_change_point_is_the_best_of_all_downward_splits(signal: list[float], least: int) -> None:
    values = torch.tensor(signal, dtype=torch.float64)
    n, found = len(signal), change_point(values, least, 1.0)
    assert least <= found <= n - least or found == n
    whole = float((values - values.mean()).square().sum())
    left = {
        k: float(sum((part - part.mean()).square().sum() for part in (values[:k], values[k:])))
        for k in range(least, n - least + 1)
        if values[:k].mean() > values[k:].mean() + 1e-9
    }
    if found < n:
        assert left[found] <= min(left.values()) + 1e-6
        assert n * math.log(whole / max(left[found], 1e-12 * whole)) > 2.0 * math.log(n) - 1e-6
    elif left and whole > 1e-6:
        assert n * math.log(whole / max(*left.values(), 1e-12 * whole)) <= 2.0 * math.log(n) + 1e-6


def test_a_margin_that_drops_is_cut_there_and_one_that_rises_nowhere() -> None:
    noise = 0.1 * torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    down = torch.cat([torch.full((25,), 2.0), torch.full((35,), 0.5)]).double() + noise
    assert abs(change_point(down, 8, 1.0) - 25) <= 1
    assert change_point(down.flip(0), 8, 1.0) == 60
    assert change_point(torch.ones(60, dtype=torch.float64) + noise, 8, 1.0) == 60
    assert change_point(down[:15], 8, 1.0) == 15


def test_change_points_are_each_rollouts_own() -> None:
    long = [2.0, 2.1, 1.9, 2.0, 0.1, 0.2, 0.1, 0.2]
    offsets, margin = packed([long, [1.0], long[::-1], long])
    config = TokenWeightConfig("change_point", min_tokens=2)
    student = torch.zeros(len(margin))
    kept = raw_weights(config, offsets, student, margin, margin)
    assert kept.tolist() == [1.0] * 4 + [0.0] * 4 + [1.0] * 9 + [1.0] * 4 + [0.0] * 4


def test_tokens_whose_reward_would_be_clipped_are_not_learnt_from() -> None:
    student = torch.tensor([-1.0, -1.0, -1.0, math.nan])
    teacher = torch.tensor([-0.5, -2.38, -2.40, -9.0], dtype=torch.float64)
    assert reward_weights(student, teacher, 0.2).tolist() == [1.0, 1.0, 0.0, 1.0]  # ln 0.25 = -1.39
    assert reward_weights(student, teacher, 0.5).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_a_microbatch_with_nothing_in_the_loss_has_no_weights() -> None:
    offsets, margin = packed([])
    assert rollout_starts(offsets) == []
    for rule in ("discrepancy", "change_point"):
        config = TokenWeightConfig(rule)
        assert raw_weights(config, offsets, margin.float(), margin, margin).shape == (0,)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teachers_view_is_that_of_its_whole_softmax(
    chunk_size: int | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(size, generator=generator).to(dtype) for size in ((17, 8), (40, 8))
    )
    labels = torch.arange(17) * 3 % 37
    labels[4] = 39  # padding: no token
    view = teacher_view(hidden, weight, labels, vocab_size=37, chunk_size=chunk_size)
    logprobs = (hidden.double() @ weight[:37].double().T).log_softmax(-1)
    best = logprobs.topk(2, dim=1).values
    torch.testing.assert_close(view.margin, best[:, 0] - best[:, 1], rtol=1e-5, atol=1e-5)
    expected = logprobs.gather(1, labels.clamp(max=36)[:, None])[:, 0]
    assert view.label_logprobs[4].isnan()
    kept = torch.arange(17) != 4
    torch.testing.assert_close(view.label_logprobs[kept], expected[kept], rtol=1e-5, atol=1e-5)
    nothing = teacher_view(hidden[:0], weight, labels[:0], vocab_size=37)
    assert nothing.margin.shape == nothing.label_logprobs.shape == (0,)
