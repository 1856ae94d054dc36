"""The plan's estimate of activations against the bytes that live in a real forward and backward."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prefix.batch import pack, padded_for, plan_microbatches
from megatron_prefix.config import LossConfig, ModelConfig, OptimizerConfig
from megatron_prefix.layout import model_layout
from megatron_prefix.mcore.groups import initialize_megatron
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.optimizer import make_trainable
from megatron_prefix.plan.activations import (
    Microbatch,
    in_flight,
    positions_held,
    scoring_peak,
    tokens_held,
    training_peak,
)
from megatron_prefix.student import Objective, forward_backward
from megatron_prefix.teacher import score_in_turn
from megatron_prefix.types import PrefixBatch, Rollout, TeacherHead, TeacherTargets
from megatron_prefix.validate import ValidModel, check_model, read_model
from tests.distributed.live_bytes import LiveBytes
from tests.distributed.ranks import run_ranks
from tests.distributed.world import CPU, build, model_config
from tests.tiny_models import (
    write_tiny_deepseek_v2,
    write_tiny_deepseek_v3,
    write_tiny_llama,
    write_tiny_mixtral,
    write_tiny_qwen3,
    write_tiny_qwen3_moe,
)

PROMPT, PREFIX, SEQUENCES, MICROBATCHES = 64, 65, 4, 4
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
}
LATENT = {
    "num_key_value_heads": 8,
    "first_k_dense_replace": 2,
    "moe_intermediate_size": 192,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
EXTRA: dict[Any, dict[str, int]] = {
    write_tiny_qwen3_moe: {"moe_intermediate_size": 384},
    write_tiny_deepseek_v2: LATENT,
    write_tiny_deepseek_v3: LATENT,
}
WITHIN = 0.1


def microbatches(model: MegatronModel) -> list[PrefixBatch]:
    """Of this rank's replica."""
    layout = model.groups.layout
    count = SEQUENCES * MICROBATCHES * layout.dp
    rollouts = [
        Rollout((3,) * PROMPT, (4,) * PREFIX, (0.0,) * PREFIX, "length", 0, i) for i in range(count)
    ]
    plan = plan_microbatches(rollouts, MICROBATCHES * layout.dp, multiple=layout.tp)
    plan = padded_for(layout.cp, rollouts, plan)
    return [pack(rollouts, plan, m, CPU) for m in plan.of_replica(model.groups.dp_rank, layout.dp)]


def peak(config: ModelConfig) -> int:
    """Bytes on this rank, of a step's forward and backward; weights and gradients lie before it."""
    initialize_megatron(1)
    student = build(config, dist.get_world_size(), owner="student")
    trainable, batches = make_trainable(student, OptimizerConfig(), 1), microbatches(student)
    width, dtype = student.hf.shape.hidden_size, student.config.params_dtype
    targets = [TeacherTargets(torch.ones(SEQUENCES * PREFIX, width, dtype=dtype)) for _ in batches]
    head = TeacherHead(torch.ones(student.vocab_rows, width, dtype=dtype), SIZES["vocab_size"])
    objective = Objective(LossConfig(), head)
    # The first step leaves the loss's workspace behind, which the plan counts on its own.
    forward_backward(trainable, batches, targets, objective, PREFIX)
    with LiveBytes() as live:
        forward_backward(trainable, batches, targets, objective, PREFIX)
    return live.peak


def scoring(config: ModelConfig) -> int:
    """Bytes on this rank while a teacher scores, its hidden states aside."""
    initialize_megatron(1)
    teacher = build(config, dist.get_world_size(), owner="teacher")
    teacher.module.requires_grad_(False).eval()
    batches = microbatches(teacher)
    with LiveBytes() as live:
        score_in_turn(teacher, batches, lambda index, hidden: None)
    return live.peak


def written(write: Callable[..., Path], settings: dict[str, Any], folder: Path) -> ModelConfig:
    parallel = {name: value for name, value in settings.items() if name != "params_dtype"}
    config = model_config(write(folder, **SIZES | EXTRA.get(write, {})), **parallel)
    return replace(config, params_dtype=settings.get("params_dtype", "fp32"))


def by_stage(config: ModelConfig, world: int, measured: Sequence[int]) -> list[float]:
    """Experts see unlike numbers of tokens; the plan speaks of the mean."""
    layout = model_layout(config, world)
    stages: list[list[int]] = [[] for _ in range(layout.pp)]
    for rank in range(world):
        stages[layout.coordinates(rank)[2]].append(measured[rank])
    return [sum(ranks) / len(ranks) for ranks in stages]


def planned(config: ModelConfig, world: int) -> ValidModel:
    hf = read_model(config.hf_path, "student")
    layers = check_model(hf, config, "student")
    return ValidModel(config, hf, model_layout(config, world), layers)


def estimate(config: ModelConfig, stage: int, world: int) -> float:
    model = planned(config, world)
    ranks = model.layout.cp
    tokens = SEQUENCES * tokens_held(ranks, PROMPT + PREFIX - 1)
    positions = SEQUENCES * positions_held(ranks, PROMPT, PREFIX)
    batch = Microbatch(tokens, positions, MICROBATCHES, PROMPT + PREFIX - 1)
    return training_peak(model, stage, batch, fused=False)


@pytest.mark.parametrize(
    ("write", "settings", "world"),
    [
        (write_tiny_qwen3, {}, 1),
        (write_tiny_qwen3, {"params_dtype": "bf16"}, 1),
        (write_tiny_llama, {"recompute_granularity": "full"}, 1),
        (write_tiny_qwen3, {"recompute_granularity": "selective"}, 1),
        (write_tiny_llama, {"tp": 2}, 2),
        (write_tiny_qwen3, {"tp": 2, "sequence_parallel": True}, 2),
        (write_tiny_qwen3, {"pp": 2}, 2),
        (write_tiny_qwen3_moe, {}, 1),
        (write_tiny_qwen3_moe, {"expert_model_parallel_size": 2}, 2),
        (write_tiny_deepseek_v2, {}, 1),
        (write_tiny_deepseek_v2, {"params_dtype": "bf16"}, 1),
        (write_tiny_qwen3, {"context_parallel_size": 2}, 2),
        (write_tiny_llama, {"context_parallel_size": 2, "params_dtype": "bf16"}, 2),
        (write_tiny_deepseek_v2, {"context_parallel_size": 2}, 2),
        (write_tiny_deepseek_v3, {}, 1),
        (write_tiny_mixtral, {}, 1),
        (write_tiny_qwen3_moe, {"tp": 2, "sequence_parallel": True}, 2),
        (
            write_tiny_qwen3_moe,
            {
                "tp": 2,
                "sequence_parallel": True,
                "expert_model_parallel_size": 2,
                "expert_tensor_parallel_size": 1,
            },
            2,
        ),
        (write_tiny_qwen3_moe, {"recompute_granularity": "full"}, 1),
    ],
)
def test_estimate_is_close_to_the_bytes_that_live(
    write: Callable[..., Path], settings: dict[str, Any], world: int, tmp_path: Path
) -> None:
    config = written(write, settings, tmp_path)
    for stage, measured in enumerate(by_stage(config, world, run_ranks(world, peak, config))):
        share = estimate(config, stage, world) / measured
        # docs/plan.md quotes these lines: pytest -rP shows them.
        print(f"estimate/measured {share:.3f}: {write.__name__} {settings} stage {stage}")
        assert share == pytest.approx(1, rel=WITHIN)


@pytest.mark.parametrize(
    ("write", "settings", "world"),
    [
        (write_tiny_qwen3, {}, 1),
        (write_tiny_qwen3, {"params_dtype": "bf16"}, 1),
        (write_tiny_llama, {"tp": 2}, 2),
        (write_tiny_llama, {"tp": 2, "sequence_parallel": True}, 2),
        (write_tiny_qwen3, {"pp": 2}, 2),
        (write_tiny_llama, {"context_parallel_size": 2}, 2),
        # Their tokens are routed alike, so no expert-parallel ranks: one expert of a rank may have
        # most of them, and here experts work one after another.
        (write_tiny_qwen3_moe, {}, 1),
        (write_tiny_qwen3_moe, {"tp": 2, "sequence_parallel": True}, 2),
        (write_tiny_mixtral, {}, 1),
        (write_tiny_deepseek_v2, {}, 1),
        (write_tiny_deepseek_v3, {}, 1),
    ],
)
def test_a_teachers_estimate_is_close_to_the_bytes_that_live_while_it_scores(
    write: Callable[..., Path], settings: dict[str, Any], world: int, tmp_path: Path
) -> None:
    config = written(write, settings, tmp_path)
    measured = run_ranks(world, scoring, config)
    for stage, mean in enumerate(by_stage(config, world, measured)):
        model = planned(config, world)
        tokens = SEQUENCES * tokens_held(model.layout.cp, PROMPT + PREFIX - 1)
        share = scoring_peak(model, stage, tokens, fused=False) / mean
        print(f"scoring, estimate/measured {share:.3f}: {write.__name__} {settings} stage {stage}")
        assert share == pytest.approx(1, rel=WITHIN)


def test_fewer_microbatches_are_in_flight_towards_the_end() -> None:
    assert [in_flight(4, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight(4, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
