"""Checkpoints: resumed bit for bit in the same layout, loadable into others, verified, retained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_prefix.config import CheckpointConfig
from megatron_prefix.mcore.checkpoint import Checkpointer, saved_steps
from tests.distributed.ranks import run_ranks
from tests.distributed.world import Case, World, model_config, rollouts
from tests.tiny_models import write_tiny_qwen3

ADAM = replace(Case.optimizer, lr=1e-2, adam_eps=1e-8, lr_warmup_steps=3, clip_grad=1.0)
CONFIG = CheckpointConfig(keep_last=2)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 62, "num_key_value_heads": 4, "initializer_range": 0.05}
    student = write_tiny_qwen3(root / "student", **sizes)
    teacher = write_tiny_qwen3(root / "teacher", seed=1, hidden_size=96, **sizes)
    return Case(model_config(student), model_config(teacher), ADAM)


def in_layout(case: Case, tp: int, pp: int) -> Case:
    student = replace(case.student, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    return replace(case, student=student)


def steps_from(
    case: Case, folder: Path, world_size: int, last: int, save_at: tuple[int, ...] = ()
) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and lr of each step up to ``last``, from the newest checkpoint on."""
    world = World.build(case, world_size)
    checkpointer = Checkpointer(folder, world.student, CONFIG)
    restored = checkpointer.restore()
    first = restored.step if restored else 0
    rows = []
    for step in range(first, last):
        loss = world.step(rollouts(seed=step)).loss
        lr = world.student.lr
        rows.append((loss, world.student.update().grad_norm, lr))
        checkpointer.finalize()
        if step + 1 in save_at:
            state = {"layout": checkpointer.layout_record(), "note": step}
            checkpointer.save(step + 1, state)
    checkpointer.finalize(wait=True)
    return rows


LAYOUTS = {"tp2": (2, 2, 1), "pp2": (2, 1, 2), "dp2": (2, 1, 1), "one rank": (1, 1, 1)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_resume_is_bit_for_bit(name: str, case: Case, tmp_path: Path) -> None:
    world_size, tp, pp = LAYOUTS[name]
    case = in_layout(case, tp, pp)
    whole = run_ranks(world_size, steps_from, case, tmp_path, world_size, 6, (3,))
    resumed = run_ranks(world_size, steps_from, case, tmp_path, world_size, 6)
    for rank in range(world_size):
        assert len(resumed[rank]) == 3
        assert resumed[rank] == whole[rank][3:]


def test_a_resumed_runs_schedule_stretches_with_its_steps(case: Case, tmp_path: Path) -> None:
    cosine = replace(ADAM, lr_decay_style="cosine", lr_warmup_steps=1)
    short, long = (replace(case, optimizer=cosine, total_steps=steps) for steps in (3, 6))
    run_ranks(1, steps_from, short, tmp_path / "run", 1, 3, (3,))
    (resumed,) = run_ranks(1, steps_from, long, tmp_path / "run", 1, 6)
    (whole,) = run_ranks(1, steps_from, long, tmp_path / "other", 1, 6)
    assert [lr for *_, lr in resumed] == [lr for *_, lr in whole[3:]]


@pytest.mark.parametrize("target", ["one rank", "pp2", "dp2"])
def test_loads_into_another_layout(target: str, case: Case, tmp_path: Path) -> None:
    whole = run_ranks(2, steps_from, in_layout(case, 2, 1), tmp_path, 2, 5, (3,))
    world_size, tp, pp = LAYOUTS[target]
    resumed = run_ranks(world_size, steps_from, in_layout(case, tp, pp), tmp_path, world_size, 5)
    for mine, theirs in zip(resumed[0], whole[0][3:], strict=True):
        assert mine == pytest.approx(theirs, rel=5e-6)


def test_the_newest_are_kept_and_nothing_partial_is(case: Case, tmp_path: Path) -> None:
    run_ranks(1, steps_from, case, tmp_path, 1, 5, (1, 2, 3, 5))
    assert [folder.name for folder in saved_steps(tmp_path)] == ["step_00000003", "step_00000005"]
    assert not list(tmp_path.glob("*.partial"))


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def newest_verified(case: Case, folder: Path) -> int:
    world = World.build(case, dist.get_world_size())
    restored = Checkpointer(folder, world.student, CONFIG).restore()
    return restored.step if restored else -1


def test_a_flipped_bit_is_found_and_the_one_before_is_used(case: Case, tmp_path: Path) -> None:
    run_ranks(1, steps_from, case, tmp_path, 1, 4, (2, 4))
    damage(next((tmp_path / "step_00000004").glob("*.distcp")))
    assert run_ranks(1, newest_verified, case, tmp_path) == [2]
    assert (tmp_path / "step_00000004.damaged").is_dir()
    (tmp_path / "step_00000002" / "run_state.json").unlink()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="none of the 1 checkpoints .* verifies"):
            run_ranks(1, newest_verified, case, tmp_path)


def test_a_half_written_checkpoint_is_ignored(case: Case, tmp_path: Path) -> None:
    run_ranks(1, steps_from, case, tmp_path, 1, 2, (2,))
    (tmp_path / "step_00000007.partial").mkdir()
    assert run_ranks(1, newest_verified, case, tmp_path) == [2]


def poisoned_update(case: Case) -> tuple[bool, bool, float]:
    """Whether an update with a NaN gradient was refused, and left the weights as they were."""
    world = World.build(case, 1)
    world.step(rollouts())
    param = next(world.student.model.module.parameters())
    before = param.detach().clone()
    param.main_grad.view(-1)[0] = float("nan")
    lr = world.student.lr
    result = world.student.update()
    return result.updated, torch.equal(param.detach(), before), world.student.lr - lr


def test_a_nan_gradient_changes_nothing_but_the_schedule(case: Case) -> None:
    ((updated, unchanged, lr_moved),) = run_ranks(1, poisoned_update, case)
    assert not updated
    assert unchanged
    assert lr_moved > 0  # warming up
