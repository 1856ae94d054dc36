"""A teacher that follows the student: what it says after a copy, what is kept, how it resumes."""

from pathlib import Path

import pytest
import torch

from megatron_prefix.batch import plan_microbatches
from megatron_prefix.teachers.lagged import LaggedTeacher
from tests.distributed.ranks import run_ranks
from tests.distributed.world import MICROBATCHES, Case, World, model_config, rollouts
from tests.tiny_models import write_tiny_qwen3


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    return write_tiny_qwen3(folder, vocab_size=62, num_key_value_heads=4)


def lagged(world: World, folder: Path, every: int = 2) -> LaggedTeacher:
    head = world.objective.teacher_head
    return LaggedTeacher(world.student.model, world.teacher, head, folder, every)


def said(world: World) -> list[torch.Tensor]:
    """The teacher's hidden states of a step's microbatches, on the student's last stage."""
    plan = plan_microbatches(rollouts(), MICROBATCHES, multiple=8)
    return [target.hidden for target in world.teacher.targets(rollouts(), plan)]


def moved(
    case: Case, world_size: int, folder: Path
) -> tuple[float, float, float, list[torch.Tensor]]:
    """KL to the teacher at first, after the student moved, and after a copy; what it says then."""
    world = World.build(case, world_size)
    alike = world.step(rollouts()).loss
    with torch.no_grad():
        for parameter in world.student.model.module.parameters():
            parameter.mul_(1.1)
    apart = world.step(rollouts()).loss
    teacher = lagged(world, folder)
    teacher.refresh(1)  # not due
    assert world.step(rollouts()).loss == apart
    teacher.refresh(2)
    return alike, apart, world.step(rollouts()).loss, said(world)


def restored(case: Case, world_size: int, folder: Path) -> tuple[float, list[torch.Tensor]]:
    world = World.build(case, world_size)
    teacher = lagged(world, folder)
    teacher.restore(1)  # before the first copy: the folder that the run began with
    alike = world.step(rollouts()).loss
    teacher.restore(3)
    return alike, said(world)


@pytest.mark.parametrize(
    ("world_size", "student_layout", "teacher_layout", "offload"),
    [(1, (1, 1), (1, 1), False), (2, (2, 1), (1, 2), True), (2, (1, 2), (2, 1), False)],
    ids=["one rank", "tp2, offloaded teacher pp2", "pp2, teacher tp2"],
)
def test_a_copy_is_exact_and_comes_back_when_the_run_resumes(
    student: Path,
    tmp_path: Path,
    world_size: int,
    student_layout: tuple[int, int],
    teacher_layout: tuple[int, int],
    offload: bool,
) -> None:
    teacher = model_config(student, *teacher_layout, offload=offload)
    case = Case(model_config(student, *student_layout), teacher)
    before = run_ranks(world_size, moved, case, world_size, tmp_path)
    after = run_ranks(world_size, restored, case, world_size, tmp_path)
    for (alike, apart, together, hidden), (again, same) in zip(before, after, strict=True):
        assert abs(alike) < 1e-7 and abs(again) < 1e-7
        assert apart > 1e-3
        assert abs(together) < 1e-7
        assert all(map(torch.equal, hidden, same))
    assert any(hidden for *_, hidden in before)


def pruned(case: Case, folder: Path) -> list[list[int]]:
    world = World.build(case, 1)
    teacher, seen = lagged(world, folder), []
    for step in range(2, 12, 2):
        teacher.refresh(step)
        seen.append(sorted(int(path.name[-2:]) for path in (folder / "teacher").iterdir()))
        if step == 4:
            (folder / "checkpoints" / "step_00000005").mkdir(parents=True)
    return seen


def test_the_last_two_copies_are_kept_and_what_a_checkpoint_needs(
    student: Path, tmp_path: Path
) -> None:
    case = Case(model_config(student), model_config(student))
    (seen,) = run_ranks(1, pruned, case, tmp_path)
    assert seen == [[2], [2, 4], [4, 6], [4, 6, 8], [4, 8, 10]]


def missing(case: Case, folder: Path) -> str:
    try:
        lagged(World.build(case, 1), folder).restore(5)
    except ValueError as error:
        return str(error)
    return ""


def test_a_copy_that_is_gone_ends_the_resume_with_its_name(student: Path, tmp_path: Path) -> None:
    case = Case(model_config(student), model_config(student))
    (told,) = run_ranks(1, missing, case, tmp_path)
    assert "teacher/step_00000004 is missing" in told
