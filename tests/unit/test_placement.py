"""Where the student and a separate teacher stand, and what is refused; who sends to whom."""

from dataclasses import replace

import pytest

from megatron_prefix.config import ModelConfig, Recipe
from megatron_prefix.layout import Layout
from megatron_prefix.placement import check_placement, resolve_world_size, routes, world_layout


def a_recipe(
    student: tuple[int, int] = (2, 1),
    teacher: tuple[int, int] = (1, 3),
    world_size: int = 0,
    **settings: object,
) -> Recipe:
    def model(sizes: tuple[int, int], **more: object) -> ModelConfig:
        tp, pp = sizes
        return ModelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **more)

    settings = {"placement": "separate", **settings}
    recipe = Recipe(student=model(student), teacher=model(teacher, **settings))
    return replace(recipe, run=replace(recipe.run, world_size=world_size))


def test_a_grid_may_begin_behind_another() -> None:
    layout = Layout(tp=2, dp=2, pp=2, ep=2, etp=1, first_rank=6)
    assert list(layout.ranks) == list(range(6, 14))
    assert all(layout.rank(*layout.coordinates(rank)) == rank for rank in layout.ranks)
    assert layout.coordinates(6) == (0, 0, 0)
    assert layout.last_stage(1) == (12, 13)
    first = replace(layout, first_rank=0)
    for rank in first.ranks:
        assert layout.expert_coordinates(rank + 6) == first.expert_coordinates(rank)


@pytest.mark.parametrize(
    ("asked", "own", "world", "student_dp", "teacher_dp"),
    [(0, 0, 5, 1, 1), (7, 0, 7, 2, 1), (0, 6, 8, 1, 2), (12, 6, 12, 3, 2)],
)
def test_the_student_has_the_first_ranks_and_the_teacher_the_last(
    asked: int, own: int, world: int, student_dp: int, teacher_dp: int
) -> None:
    recipe = a_recipe(world_size=asked)
    recipe = replace(recipe, teacher=replace(recipe.teacher, world_size=own))
    assert resolve_world_size(recipe) == world
    found = world_layout(recipe, world)
    assert found.separate()
    assert (found.student.dp, found.teacher.dp) == (student_dp, teacher_dp)
    assert [*found.student.ranks, *found.teacher.ranks] == list(range(world))


def test_colocated_models_share_every_rank() -> None:
    recipe = a_recipe(placement="colocated")
    found = world_layout(recipe, resolve_world_size(recipe))
    assert not found.separate()
    assert list(found.student.ranks) == list(found.teacher.ranks) == list(range(6))


@pytest.mark.parametrize(("asked", "remedy"), [(6, "try 5 or 7"), (3, "try 5"), (4, "try 5")])
def test_ranks_that_the_student_cannot_share_name_those_it_can(asked: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"run.world_size={asked} must be 3 ranks .*{remedy}"):
        resolve_world_size(a_recipe(world_size=asked))


def test_settings_of_a_teacher_are_refused_elsewhere() -> None:
    recipe = a_recipe()
    check_placement(recipe)
    with pytest.raises(ValueError, match="student.placement=separate .*settings of a teacher"):
        check_placement(replace(recipe, student=replace(recipe.student, placement="separate")))
    with pytest.raises(ValueError, match="teacher.world_size=3 needs teacher.placement=separate"):
        check_placement(
            replace(recipe, teacher=ModelConfig(pipeline_model_parallel_size=3, world_size=3))
        )
    with pytest.raises(ValueError, match="student.offload=true is a setting of a teacher"):
        check_placement(replace(recipe, student=replace(recipe.student, offload=True)))
    with pytest.raises(ValueError, match="offload=true .*=separate: .* has its ranks to itself"):
        check_placement(replace(recipe, teacher=replace(recipe.teacher, offload=True)))
    with pytest.raises(ValueError, match="offload=true .*=server: a teacher that is behind serv"):
        check_placement(replace(recipe, teacher=ModelConfig(placement="server", offload=True)))
    with pytest.raises(ValueError, match="teacher.world_size=4 must be a multiple of 3.*3 or 6"):
        check_placement(replace(recipe, teacher=replace(recipe.teacher, world_size=4)))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (Layout(2, 2, 1), Layout(1, 3, 2, first_rank=4)),
        (Layout(1, 4, 1), Layout(2, 1, 2, first_rank=4)),
        (Layout(2, 2, 2), Layout(4, 2, 1)),
    ],
)
def test_replicas_are_served_side_by_side(student: Layout, teacher: Layout) -> None:
    count = 12
    found = routes(count, student, teacher)
    assert sorted(way.microbatch for way in found) == list(range(count))
    share = count // student.dp
    for place, way in enumerate(found):
        replica, at = way.microbatch // share, way.microbatch % share
        assert at == place // student.dp  # no replica is ahead of another
        assert [receiver for _, receiver in way.pairs] == list(student.last_stage(replica))
        senders = teacher.last_stage(place % teacher.dp)
        for sender, receiver in way.pairs:
            assert sender in senders
            assert sender == receiver or receiver not in senders
