"""A disk that is full when a checkpoint is to be written: a small tmpfs of the test's own."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_prefix.mcore.checkpoint import Checkpointer, SaveFailed
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import CONFIG, case, in_layout
from tests.distributed.world import Case, World, rollouts

__all__ = ["case"]  # the fixture


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """24 MB, in a mount namespace of this thread's and of what it starts."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    here, outside = os.getcwd(), os.open("/proc/self/ns/mnt", os.O_RDONLY)
    os.unshare(os.CLONE_NEWNS)
    try:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(tmp_path)]
        subprocess.run(mount, check=True)
        yield tmp_path
    finally:
        os.setns(outside, os.CLONE_NEWNS)  # the namespace and its disk end with its last process
        os.close(outside)
        os.chdir(here)


def save_on_a_full_disk(case: Case, disk: Path, spare_bytes: int) -> list[str]:
    """What is said of a save with room, two without (the second has to be whole), one with, and one
    that has to be whole after another without, of which nobody asked."""
    world = World.build(case, dist.get_world_size())
    checkpointer = Checkpointer(disk / "checkpoints", world.student, CONFIG)
    told = []

    def save(step: int, *, wait: bool) -> None:
        world.step(rollouts(seed=step))
        world.student.update()
        checkpointer.save(step, {"layout": checkpointer.layout_record()}, wait=wait)
        checkpointer.finalize(wait=True)
        told.append(checkpointer.take_problem())

    save(1, wait=False)
    fill(disk, spare_bytes)
    save(2, wait=False)
    try:
        save(3, wait=True)
    except SaveFailed as error:
        told.append(str(error))
    fill(disk, 0, empty=True)
    save(4, wait=True)
    fill(disk, spare_bytes)
    checkpointer.save(5, {"layout": checkpointer.layout_record()})
    checkpointer.finalize(wait=True)
    fill(disk, 0, empty=True)
    save(6, wait=True)
    return told


def fill(disk: Path, spare_bytes: int, *, empty: bool = False) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        (disk / "ballast").unlink(missing_ok=True)
        if not empty:
            free = shutil.disk_usage(disk).free
            (disk / "ballast").write_bytes(b"\0" * (free - spare_bytes))
    dist.barrier()


@pytest.mark.parametrize("spare_bytes", [100_000, 500_000], ids=["no room", "room for a part"])
def test_a_full_disk_costs_no_checkpoint_and_no_step(
    case: Case, small_disk: Path, spare_bytes: int
) -> None:
    ranks = run_ranks(2, save_on_a_full_disk, in_layout(case, 2, 1), small_disk, spare_bytes)
    first, second, third, fourth, sixth = ranks[0]
    assert (first, fourth) == ("", "")
    assert "checkpoint step_00000002 could not be written: " in second
    assert "checkpoint step_00000003 could not be written: " in third
    words = "No space left" if spare_bytes < 200_000 else "Worker failure"
    assert words in second and words in third
    assert "the newest whole one is step_00000001" in second
    assert "checkpoint step_00000005 could not be written: " in sixth
    left = sorted(path.name for path in (small_disk / "checkpoints").iterdir())
    assert left == [f"step_0000000{step}" for step in (4, 6)]  # the last two
