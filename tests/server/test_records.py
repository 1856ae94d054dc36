"""Recorded rollouts come back as they were."""

from pathlib import Path

import numpy as np
import pytest

from megatron_prefix.rollout.records import load_rollouts, rollout_file, save_rollouts
from megatron_prefix.types import Rollout

LOGPROBS = tuple(float(value) for value in np.float32([-0.1, -2.7182817, -1e-8]))
ROLLOUTS = [
    Rollout((1, 2, 3), (4, 5, 151_000), LOGPROBS, "length", 7, 2**40),
    Rollout((9,), (2,), (-0.0,), "stop", 8, 1),
    Rollout((9, 9), (3, 3), LOGPROBS[:2], "abort", 8, 2),
    Rollout((8,), (), (), "cut", 0, 3, discarded=5),
    Rollout((8,), (4,), (-2.0,), "length", 0, 4, written=True, teacher_prompt_ids=(5, 6)),
]


@pytest.mark.parametrize("rollouts", [ROLLOUTS, ROLLOUTS[::-1], ROLLOUTS[:1], []])
def test_round_trip_is_exact(tmp_path: Path, rollouts: list[Rollout]) -> None:
    save_rollouts(tmp_path / "records", 3, rollouts)
    assert load_rollouts(tmp_path / "records", 3) == rollouts


def test_steps_are_kept_apart_and_replaced(tmp_path: Path) -> None:
    save_rollouts(tmp_path, 1, ROLLOUTS[:1])
    save_rollouts(tmp_path, 2, ROLLOUTS[1:])
    save_rollouts(tmp_path, 1, ROLLOUTS[2:])
    assert load_rollouts(tmp_path, 1) == ROLLOUTS[2:]
    assert load_rollouts(tmp_path, 2) == ROLLOUTS[1:]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        rollout_file(tmp_path, step).name for step in (1, 2)
    ]


def test_a_step_that_was_not_recorded_is_named(tmp_path: Path) -> None:
    save_rollouts(tmp_path, 1, ROLLOUTS)
    with pytest.raises(ValueError, match=r"no recorded rollouts of step 2: .*00000002.*is missing"):
        load_rollouts(tmp_path, 2)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_damaged_record_is_named(tmp_path: Path, kept: int) -> None:
    path = save_rollouts(tmp_path, 1, ROLLOUTS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{path} is no complete record of rollouts"):
        load_rollouts(tmp_path, 1)
