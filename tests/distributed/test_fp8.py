"""What FP8 adds to a checkpoint and to the layers, as far as a CPU shows it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig

from megatron_prefix.batch import pack, plan_microbatches
from megatron_prefix.config import CheckpointConfig, Fp8Config, ModelConfig, Recipe
from megatron_prefix.mcore.checkpoint import Checkpointer
from megatron_prefix.mcore.fp8 import fp8_fields
from megatron_prefix.world import token_multiple
from tests.distributed.ranks import run_ranks
from tests.distributed.world import CPU, Case, World, model_config, rollouts
from tests.tiny_models import write_tiny_qwen3

BLOCKS = Fp8Config("e4m3", "blockwise")


class _WithHistory(ColumnParallelLinear):
    """Keeps a history as extra state, a uint8 tensor on the CPU, as Transformer Engine does."""

    history: torch.Tensor

    def get_extra_state(self) -> torch.Tensor:
        return self.history

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is not None:
            self.history = state


def _world(case: Case, world_size: int, history: int) -> tuple[World, list[_WithHistory]]:
    world = World.build(case, world_size)
    linears = [layer.mlp.linear_fc1 for layer in world.student.model.module.decoder.layers]
    for index, linear in enumerate(linears):
        linear.__class__ = _WithHistory
        linear.history = torch.full((7,), history * (index + 1), dtype=torch.uint8)
    return world, linears


def _save(case: Case, folder: Path, world_size: int, history: int) -> None:
    """With ``history`` 0, of a model without such state."""
    world = _world(case, world_size, history)[0] if history else World.build(case, world_size)
    world.step(rollouts())
    world.student.update()  # a saved optimizer has moments
    Checkpointer(folder, world.student, CheckpointConfig()).save(1, {"layout": []}, wait=True)


def _restore(case: Case, folder: Path, world_size: int, history: int) -> list[list[int]]:
    world, linears = _world(case, world_size, history)
    assert Checkpointer(folder, world.student, CheckpointConfig()).restore() is not None
    return [linear.history.tolist() for linear in linears]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = write_tiny_qwen3(tmp_path_factory.mktemp("models") / "student", num_hidden_layers=4)
    return Case(model_config(folder), model_config(folder))


@pytest.mark.parametrize("tp", [1, 2])
def test_extra_state_of_every_layer_is_in_the_checkpoint(
    tp: int, case: Case, tmp_path: Path
) -> None:
    config = model_config(Path(case.student.hf_path), tp=tp)
    case = Case(config, config)
    run_ranks(tp, _save, case, tmp_path, tp, 40)
    for layers in run_ranks(tp, _restore, case, tmp_path, tp, 0):
        assert layers == [[40] * 7, [80] * 7, [120] * 7, [160] * 7]


def test_a_checkpoint_without_such_state_leaves_it_as_it_was(case: Case, tmp_path: Path) -> None:
    run_ranks(1, _save, case, tmp_path, 1, 0)
    (layers,) = run_ranks(1, _restore, case, tmp_path, 1, 3)
    assert layers == [[3] * 7, [6] * 7, [9] * 7, [12] * 7]


def _bf16_layers(case: Case, world_size: int) -> list[tuple[int, bool]]:
    """Numbers of this stage's layers, and whether Megatron would leave FP8's context for them."""
    fields = fp8_fields(Fp8Config("e4m3"), own_scales=False)
    config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, **fields)
    layers = World.build(case, world_size).student.model.module.decoder.layers
    numbers = [layer.layer_number for layer in layers]
    return [(number, is_first_last_bf16_layer(config, number - 1)) for number in numbers]


@pytest.mark.parametrize("pp", [1, 2])
def test_the_first_and_the_last_layer_of_the_whole_model_are_in_bf16(pp: int, case: Case) -> None:
    config = model_config(Path(case.student.hf_path), pp=pp)
    stages = run_ranks(pp, _bf16_layers, Case(config, config), pp)
    found = [layer for stage in stages for layer in stage]
    assert found == [(1, True), (2, False), (3, False), (4, True)]


@pytest.mark.parametrize(
    ("student", "teacher", "multiple"),
    [
        ({}, {}, 1),
        ({"fp8": BLOCKS}, {}, 128),
        ({}, {"fp8": BLOCKS}, 128),
        ({"tensor_model_parallel_size": 2}, {}, 1),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"fp8": BLOCKS}, 128),
        # Each of two parts is a multiple of 128 tokens.
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True, "fp8": BLOCKS}, {}, 256),
        ({"tensor_model_parallel_size": 3, "sequence_parallel": True}, {"fp8": BLOCKS}, 384),
    ],
)
def test_microbatches_are_padded_to_what_every_model_cuts(
    student: dict[str, Any], teacher: dict[str, Any], multiple: int
) -> None:
    recipe = Recipe(student=ModelConfig(**student), teacher=ModelConfig(**teacher))
    assert token_multiple(recipe) == multiple
    packed = plan_microbatches(rollouts(), 4, multiple=multiple)
    for number in range(4):
        batch = pack(rollouts(), packed, number, CPU)
        assert len(batch.input_ids) % multiple == 0 and len(batch.labels)
