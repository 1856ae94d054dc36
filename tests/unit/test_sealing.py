"""From written files to a checkpoint that counts, and which older ones go for it."""

import json
import random
import shutil
from pathlib import Path

import pytest

from megatron_prefix.config import CheckpointConfig
from megatron_prefix.mcore.manifest import damage
from megatron_prefix.mcore.sealing import Sealing, seal
from megatron_prefix.mcore.step_folders import (
    saved_steps,
    set_aside,
    step_folder,
    step_of,
)


def write_partial(folder: Path, step: int) -> tuple[Path, Path]:
    """All that ranks write of a checkpoint, and the name that it is to have."""
    final = step_folder(folder, step)
    partial = final.with_suffix(".partial")
    partial.mkdir(parents=True)
    (partial / "run_state.json").write_text(json.dumps({"step": step}))
    for rank in range(2):
        (partial / f"__{rank}_0.distcp").write_text(f"weights {step} of {rank} " * 99)
    return partial, final


def truncate(folder: Path) -> None:
    file = folder / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:100])


def newest_whole(folder: Path) -> int:
    return max((step_of(saved) for saved in saved_steps(folder) if not damage(saved)), default=-1)


def test_it_is_whole_under_its_final_name_once_it_is_sealed(tmp_path: Path) -> None:
    partial, final = write_partial(tmp_path, 4)
    sealing = Sealing(partial, final, CheckpointConfig())
    assert sealing.problem() == "" and sealing.done()
    assert saved_steps(tmp_path) == [final] and damage(final) == "" and not partial.exists()
    truncate(final)
    assert "__1_0.distcp: sum is not that" in damage(final)


def test_without_sums_there_is_no_manifest(tmp_path: Path) -> None:
    partial, final = write_partial(tmp_path, 4)
    assert seal(partial, final, CheckpointConfig(verify_integrity=False)) == ""
    assert sorted(file.name for file in final.iterdir())[-1] == "run_state.json"


def test_what_cannot_be_sealed_is_told_and_the_older_ones_stay(tmp_path: Path) -> None:
    assert seal(*write_partial(tmp_path, 2), CheckpointConfig(keep_last=1)) == ""
    partial, final = write_partial(tmp_path, 4)
    (partial / "run_state.json").unlink()
    problem = seal(partial, final, CheckpointConfig(keep_last=1))
    assert "run_state.json" in problem and "\n" not in problem
    assert [step_of(saved) for saved in saved_steps(tmp_path)] == [2]


def restart(folder: Path) -> int:
    """As a run resumes, damaged ones set aside: the step that it goes on from."""
    for saved in reversed(saved_steps(folder)):
        if not damage(saved):
            return step_of(saved)
        set_aside(saved)
    return 0


@pytest.mark.parametrize("seed", range(12))
def test_retention_never_removes_the_newest_whole_checkpoint(seed: int, tmp_path: Path) -> None:
    """Over a life of saves, restarts and checkpoints that are truncated where they lie: what is
    the newest whole one before a save is there until a newer whole one is, and then that one is."""
    chance = random.Random(seed)
    config = CheckpointConfig(keep_last=seed % 4, keep_every=2 * (seed // 4))
    step = 0
    for _ in range(20):
        step += chance.randint(1, 3)
        before = newest_whole(tmp_path)
        partial, final = write_partial(tmp_path, step)
        if chance.random() < 0.3:  # killed in the save
            step = restart(tmp_path)
            assert step == max(before, 0)
            shutil.rmtree(partial)  # as the next save of that step does
            continue
        held = {step_of(saved) for saved in saved_steps(tmp_path)}
        assert seal(partial, final, config) == ""
        assert newest_whole(tmp_path) == step
        gone = held - {step_of(saved) for saved in saved_steps(tmp_path)}
        assert bool(config.keep_last) or not gone
        assert not config.keep_every or all(old % config.keep_every for old in gone)
        if chance.random() < 0.3:
            truncate(final)
            if chance.random() < 0.5:
                step = restart(tmp_path)
