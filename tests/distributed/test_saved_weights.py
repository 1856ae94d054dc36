"""A run starts from a converted checkpoint as from the Hugging Face folder itself."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_prefix.layout import model_layout
from megatron_prefix.mcore.conversion import Conversion
from megatron_prefix.mcore.convert_to_megatron import hf_to_megatron
from megatron_prefix.mcore.groups import build_groups, initialize_megatron
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.model import build_model
from megatron_prefix.mcore.saved_weights import load_saved_weights
from megatron_prefix.mcore.steps import check_saved_weights
from megatron_prefix.mcore.weights import named_units
from tests.distributed.ranks import run_ranks
from tests.distributed.world import Case, World, build, model_config, rollouts
from tests.tiny_models import (
    write_tiny_deepseek_v2,
    write_tiny_deepseek_v3,
    write_tiny_llama,
    write_tiny_qwen3,
    write_tiny_qwen3_moe,
)

EXPERTS = {"expert_model_parallel_size": 2}
CASES = {
    "qwen3, one rank": (write_tiny_qwen3, 1, {}),
    "llama, tp2": (write_tiny_llama, 2, {"tp": 2}),
    "qwen3, pp2": (write_tiny_qwen3, 2, {"pp": 2}),
    "qwen3-moe, ep2": (write_tiny_qwen3_moe, 2, EXPERTS),
    "deepseek-v3, tp2": (write_tiny_deepseek_v3, 2, {"tp": 2, "sequence_parallel": True}),
    "deepseek-v2, pp2": (write_tiny_deepseek_v2, 2, {"pp": 2}),
}


def convert(folder: Path, output: Path, dtype: str = "fp32") -> Path:
    job = Conversion(read_hf_model(str(folder)), output, dtype)
    hf_to_megatron(job, lambda size: None)
    return output


def differences(config, converted: Path, world_size: int) -> list[str]:
    """Parameters of this rank that are not what the Hugging Face folder gives."""
    initialize_megatron(0)
    expected = build(config, world_size, owner="student")
    groups = build_groups(model_layout(config, world_size))
    hf = read_hf_model(config.hf_path)
    model = build_model(config, hf, groups, owner="student", with_head=True)
    load_saved_weights(model, str(converted))
    pairs = zip(named_units(expected), named_units(model), strict=True)
    return [a[0].megatron_name for a, b in pairs if not torch.equal(a[1], b[1])]


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_the_folders_in_any_layout(name: str, tmp_path: Path) -> None:
    write, world_size, layout = CASES[name]
    folder = write(tmp_path / "model", vocab_size=61)
    converted = convert(folder, tmp_path / "megatron")
    config = model_config(folder, **layout)
    found = run_ranks(world_size, differences, config, converted, world_size)
    assert found == [[]] * world_size


def first_loss(case: Case, converted: Path | None) -> float:
    world = World.build(case, torch.distributed.get_world_size())
    if converted is not None:
        for parameter in world.student.model.module.parameters():
            parameter.data.zero_()
        load_saved_weights(world.student.model, str(converted))
    return world.step(rollouts()).loss


def test_the_first_steps_loss_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    sizes = {"vocab_size": 62, "num_key_value_heads": 4}
    folder = write_tiny_qwen3(tmp_path / "student", **sizes)
    teacher = write_tiny_qwen3(tmp_path / "teacher", seed=1, **sizes)
    converted = convert(folder, tmp_path / "megatron")
    case = Case(model_config(folder, tp=2), model_config(teacher, pp=2))
    expected = run_ranks(2, first_loss, case, None)
    assert run_ranks(2, first_loss, case, converted) == expected
    assert expected[0] == expected[1] > 0


def test_bf16_weights_load_into_a_model_in_fp32(tmp_path: Path) -> None:
    folder = write_tiny_qwen3(tmp_path / "model", vocab_size=61)
    converted = convert(folder, tmp_path / "megatron", "bf16")
    rounded = replace(model_config(folder), params_dtype="bf16")
    assert run_ranks(1, differences, rounded, converted, 1) == [[]]


def test_what_holds_no_such_model_is_refused(tmp_path: Path) -> None:
    converted = convert(write_tiny_qwen3(tmp_path / "model"), tmp_path / "megatron")
    other = read_hf_model(str(write_tiny_llama(tmp_path / "other")))
    with pytest.raises(ValueError, match="output_layer.weight is missing") as refusal:
        check_saved_weights(other, str(converted))
    assert "q_layernorm.weight has no place in it" in str(refusal.value)
    with pytest.raises(ValueError, match="^checkpoint.load=nowhere is no folder$"):
        check_saved_weights(other, "nowhere")
    (converted / "step_00000000" / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="is no whole Megatron checkpoint"):
        check_saved_weights(other, str(converted))
