"""FP8 settings as Megatron gets them, what is refused, and what FP8 saves."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_prefix.config import Fp8Config, ModelConfig, Recipe
from megatron_prefix.doctor import _fp8_recipes
from megatron_prefix.mcore.fp8 import (
    fp8_fields,
    refuse_delayed,
    refuse_machine,
    saved_activation_bytes,
)
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.validate.cards import asked_of_cards
from tests.refused import refusal_of
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


CARDS = {
    "NVIDIA A100-SXM4-80GB": ((8, 0), ()),
    "NVIDIA L40S": ((8, 9), ("tensorwise", "delayed")),
    "NVIDIA H100 80GB HBM3": ((9, 0), ("blockwise", "tensorwise", "delayed")),
    "NVIDIA B200": ((10, 0), ("blockwise", "tensorwise", "delayed", "mxfp8", "nvfp4")),
}


def on(monkeypatch: pytest.MonkeyPatch, card: str, cuda: str = "13.0") -> None:
    """This machine is one with that card and Transformer Engine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: CARDS[card][0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def refused(recipe: str) -> str:
    return refusal_of(refuse_machine, Fp8Config("e4m3", recipe), "student")


@pytest.mark.parametrize("card", CARDS)
def test_a_card_runs_the_recipes_that_it_has_units_for(
    card: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, card)
    taken = CARDS[card][1]
    assert _fp8_recipes() == taken
    for recipe in ("blockwise", "tensorwise", "delayed", "mxfp8", "nvfp4"):
        if recipe not in taken:
            message = refused(recipe)
            assert message.startswith("student.fp8") and card in message


def test_a_refused_recipe_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert refused("nvfp4") == (
        "student.fp8.recipe='nvfp4' needs a Blackwell card and this is NVIDIA H100 80GB HBM3; "
        "take 'blockwise' or 'tensorwise'"
    )
    on(monkeypatch, "NVIDIA L40S")
    assert refused("blockwise").endswith("this is NVIDIA L40S; take 'tensorwise' or 'delayed'")
    on(monkeypatch, "NVIDIA A100-SXM4-80GB")
    assert "(compute 8.0) has no FP8 units" in refused("tensorwise")


@pytest.mark.parametrize(("cuda", "runs"), [("12.8", False), ("12.9", True), ("13.0", True)])
def test_blocks_need_a_cuda_that_has_them(
    cuda: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, "NVIDIA H100 80GB HBM3", cuda)
    assert ("blockwise" in _fp8_recipes()) == runs
    if not runs:
        assert "CUDA 12.9 or newer and this one has 12.8; take 'tensorwise'" in refused("blockwise")


def test_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "NVIDIA B200")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs Transformer Engine" in refused("tensorwise")


def test_what_is_planned_elsewhere_says_which_cards_it_needs() -> None:
    blocks, narrow = (
        ModelConfig(fp8=Fp8Config("e4m3", recipe)) for recipe in ("blockwise", "nvfp4")
    )
    assert asked_of_cards(Recipe(student=blocks, teacher=blocks)) == []
    idle = replace(narrow, fp8=replace(narrow.fp8, format="off"))
    assert asked_of_cards(Recipe(student=idle, teacher=idle)) == []
    (sentence,) = asked_of_cards(Recipe(student=blocks, teacher=narrow))
    assert sentence.startswith("teacher.fp8.recipe=nvfp4 needs Blackwell cards")


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
