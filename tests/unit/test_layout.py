"""Rank arithmetic against Megatron's order, and layers over stages."""

from dataclasses import replace

import pytest

from megatron_prefix.config import ModelConfig
from megatron_prefix.layout import Layout, layers_by_stage, model_layout, saved_layout


def test_ranks_and_coordinates_are_inverse_and_tensor_parallel_runs_fastest() -> None:
    layout = Layout(tp=2, dp=3, pp=4)
    seen = [layout.rank(tp, dp, pp) for pp in range(4) for dp in range(3) for tp in range(2)]
    assert seen == list(range(24))
    assert all(layout.rank(*layout.coordinates(rank)) == rank for rank in range(24))
    assert layout.last_stage(1) == (20, 21)


def test_context_parallel_ranks_stand_between_tensor_and_data_parallel_ones() -> None:
    layout = Layout(tp=2, dp=3, pp=2, cp=2, first_rank=5)
    assert layout.ranks == range(5, 29)
    for rank in layout.ranks:
        tp, dp, pp = layout.coordinates(rank)
        assert layout.rank(tp, dp, pp, layout.context_rank(rank)) == rank
        assert layout.replica_rank(rank) == layout.context_rank(rank) + 2 * dp
    assert layout.last_stage(1) == (21, 22, 23, 24)
    assert layout.expert_dp == 6


@pytest.mark.parametrize(
    ("layers", "pp", "first", "expected"),
    [
        (4, 1, 0, (4,)),
        (4, 2, 0, (2, 2)),
        (3, 2, 0, (2, 1)),
        (7, 3, 0, (3, 2, 2)),
        (5, 2, 1, (1, 4)),
    ],
)
def test_layers_by_stage(layers: int, pp: int, first: int, expected: tuple[int, ...]) -> None:
    assert layers_by_stage(layers, pp, first) == expected


def test_layers_that_do_not_divide_name_a_first_stage_that_would() -> None:
    with pytest.raises(
        ValueError, match=r"num_layers_in_first_pipeline_stage=2 leaves 5 of 7 .*try 3"
    ):
        layers_by_stage(7, 3, 2)


def test_a_world_that_does_not_divide_names_one_that_would() -> None:
    model = ModelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match="world size 6 is no multiple of .*2\\*2; start 8 ranks"):
        model_layout(model, 6)
    with pytest.raises(ValueError, match="tensor\\*context\\*pipeline .*2\\*3\\*2; start 12 ranks"):
        model_layout(replace(model, context_parallel_size=3), 8)


def test_a_saved_layout_is_known_again() -> None:
    layout = Layout(tp=4, dp=3, pp=2, ep=2, cp=2)
    assert layout.record == {"tp": 4, "cp": 2, "dp": 3, "pp": 2, "ep": 2, "etp": 4}
    assert layout.was_saved(saved_layout({"layout": layout.record}))
    for other in ({"ep": 1}, {"cp": 1}, {"etp": 2}):
        assert not layout.was_saved(saved_layout({"layout": {**layout.record, **other}}))
    assert not layout.was_saved(saved_layout({}))


def test_a_list_of_an_older_checkpoint_is_read() -> None:
    assert saved_layout({"layout": [2, 3, 4]}) == {"tp": 2, "dp": 3, "pp": 4}
    assert Layout(tp=2, dp=3, pp=4).was_saved({"tp": 2, "dp": 3, "pp": 4})
    assert not Layout(tp=2, dp=3, pp=1).was_saved({"tp": 2, "dp": 3, "pp": 4})
