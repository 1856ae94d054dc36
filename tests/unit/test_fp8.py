"""FP8 settings as Megatron gets them, what is refused, and what FP8 saves."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prefix.config import Fp8Config, ModelConfig
from megatron_prefix.mcore.fp8 import (
    fp8_fields,
    refuse_delayed,
    saved_activation_bytes,
)
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from tests.tiny_models import write_tiny_qwen3

DELAYED = ModelConfig(fp8=Fp8Config("hybrid", "delayed", first_last_layers_bf16=False))


def test_student_and_teacher_have_recipes_of_their_own() -> None:
    student, teacher = (
        fp8_fields(fp8, own_scales=True) for fp8 in (Fp8Config("e4m3", "blockwise"), DELAYED.fp8)
    )
    assert (student["fp8"], student["fp8_recipe"]) == ("e4m3", "blockwise")
    assert (teacher["fp8"], teacher["fp8_recipe"]) == ("hybrid", "delayed")
    assert student["first_last_layers_bf16"] and not teacher["first_last_layers_bf16"]
    assert not student["fp8_param"]
    assert teacher["tp_only_amax_red"] and not student["tp_only_amax_red"]
    assert not fp8_fields(DELAYED.fp8, own_scales=False)["tp_only_amax_red"]


@pytest.mark.parametrize("owner", ["teacher", "teachers.maths"])
def test_a_teacher_cannot_move_delayed_scales(owner: str) -> None:
    refuse_delayed(ModelConfig(pipeline_model_parallel_size=2), owner, beside=True)
    with pytest.raises(ValueError, match=f"{owner}.fp8.recipe='delayed' never moves its scales"):
        refuse_delayed(DELAYED, owner, beside=False)


def test_delayed_scales_of_tensor_parallel_ranks_need_the_world_to_themselves() -> None:
    sharded = replace(DELAYED, tensor_model_parallel_size=2)
    refuse_delayed(sharded, "student", beside=False)
    refuse_delayed(replace(DELAYED, pipeline_model_parallel_size=2), "student", beside=True)
    with pytest.raises(ValueError, match="beside the ranks of a separate teacher; take"):
        refuse_delayed(sharded, "student", beside=True)
    with pytest.raises(ValueError, match="beside 2 pipeline stages; take"):
        refuse_delayed(replace(sharded, pipeline_model_parallel_size=2), "student", beside=False)


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> DecoderShape:
    folder: Path = tmp_path_factory.mktemp("models") / "student"
    return read_hf_model(str(write_tiny_qwen3(folder, num_hidden_layers=4))).shape


@pytest.mark.parametrize(
    "settings, layers, saved",
    [
        # hidden 64 into qkv and fc1, 64 heads' width into proj, 96 into fc2; two of four layers
        ({}, (4,), 2 * (2 * 64 + 64 + 96)),
        ({"tensor_model_parallel_size": 2}, (4,), 2 * (2 * 64 + 32 + 48)),
        (
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            (4,),
            2 * (64 + 32 + 48),
        ),
        ({"pipeline_model_parallel_size": 2}, (1, 3), 2 * (2 * 64 + 64 + 96)),
        ({"recompute_granularity": "full"}, (4,), 0),
        ({"fp8": Fp8Config()}, (4,), 0),
    ],
)
def test_bytes_saved_a_token(
    settings: dict[str, object], layers: tuple[int, ...], saved: int, shape: DecoderShape
) -> None:
    model = replace(ModelConfig(fp8=Fp8Config("e4m3", "blockwise")), **settings)
    assert saved_activation_bytes(model, shape, layers) == saved
