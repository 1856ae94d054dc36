"""An update is Megatron's own step, which takes each gradient's norm once."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from megatron.core.optimizer import optimizer as megatron_optimizer

from megatron_prefix.config import OptimizerConfig
from tests.distributed.ranks import run_ranks
from tests.distributed.world import Case, World, model_config, rollouts
from tests.tiny_models import write_tiny_qwen3, write_tiny_qwen3_moe

STEPS = 3
CLIPPED = OptimizerConfig(lr=1e-2, lr_warmup_steps=1, clip_grad=1e-3)
# The student, its layout, its precision, and whether the distributed optimizer moves it.
CASES = [
    ("dense", {"tp": 2}, "fp32", False),
    ("dense", {"tp": 2}, "bf16", False),
    ("dense", {}, "bf16", True),
    ("experts", {"expert_model_parallel_size": 2}, "fp32", True),
    ("experts", {"expert_model_parallel_size": 2}, "bf16", False),
    ("experts", {"pp": 2}, "bf16", True),
]


def updated(case: Case, by_megatron: bool) -> tuple[list[float], int, dict[str, torch.Tensor]]:
    """Norms of some steps, how often one was computed, and on rank 0 the weights after them."""
    world, norms = World.build(case, 2), []
    student, compute = world.student, megatron_optimizer.get_grad_norm_fp32
    with patch.object(megatron_optimizer, "get_grad_norm_fp32", wraps=compute) as computed:
        for step in range(STEPS):
            world.step(rollouts(seed=step))
            if by_megatron:
                norms.append(float(student.optimizer.step()[1]))
                student.scheduler.step(increment=1)
            else:
                norms.append(student.update().grad_norm)
    return norms, computed.call_count, world.weights()


@pytest.mark.parametrize(("kind", "layout", "dtype", "sharded"), CASES)
def test_an_update_is_megatrons_step(
    kind: str, layout: dict, dtype: str, sharded: bool, tmp_path: Path
) -> None:
    write = write_tiny_qwen3 if kind == "dense" else write_tiny_qwen3_moe
    folder = write(tmp_path / "model", vocab_size=62, num_key_value_heads=4)
    teacher = write_tiny_qwen3(tmp_path / "teacher", vocab_size=62, seed=1)
    student = replace(model_config(folder, **layout), params_dtype=dtype)
    optimizer = replace(CLIPPED, use_distributed_optimizer=sharded)
    case = Case(student, replace(model_config(teacher), params_dtype=dtype), optimizer)
    mine, theirs = (run_ranks(2, updated, case, by_megatron) for by_megatron in (False, True))
    for (norms, count, weights), (expected, expected_count, expected_weights) in zip(
        mine, theirs, strict=True
    ):
        assert min(norms) > CLIPPED.clip_grad
        assert norms == expected
        assert count == expected_count
        assert weights.keys() == expected_weights.keys()
        assert all(torch.equal(weights[key], expected_weights[key]) for key in weights)
