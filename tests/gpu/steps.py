"""What the GPU tests run, on whatever device it is given: a CPU runs it in the unit tests."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.batch import pack, padded_for, plan_microbatches
from megatron_prefix.config import Fp8Config, LossConfig, ModelConfig, OptimizerConfig
from megatron_prefix.mcore.fp8 import SEQUENCE_MULTIPLE
from megatron_prefix.mcore.groups import initialize_megatron
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.optimizer import make_trainable
from megatron_prefix.mcore.schedule import run_schedule
from megatron_prefix.mcore.weights import head_shard
from megatron_prefix.student import Objective, forward_backward
from megatron_prefix.teacher import ColocatedTeacher
from megatron_prefix.types import Rollout, TeacherHead
from tests.distributed.world import LONGEST_PREFIX, build, rollouts
from tests.tiny_models import write_tiny_qwen3, write_tiny_qwen3_moe

# Widths that FP8's 128x128 blocks divide.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
VOCABULARY = 1024


@dataclass(frozen=True)
class Outcome:
    """Of one step, on the CPU."""

    loss: float
    kl: Tensor  # fp64 [prefix length], sums by position
    gradient: Tensor  # fp32, of every parameter, as their common names sort
    # Of delayed scaling, by module: those of inputs, weights and outputs, after the step.
    scales: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    student: Path
    teacher: Path
    params_dtype: str = "bf16"
    fp8: Fp8Config = Fp8Config()
    teacher_fp8: Fp8Config = Fp8Config()
    context_parallel_size: int = 1  # of both models


def write_models(root: Path) -> tuple[Path, Path]:
    sizes = {"vocab_size": VOCABULARY, "initializer_range": 0.05, **WIDE}
    student = write_tiny_qwen3(root / "student", num_hidden_layers=4, **sizes)
    teacher = write_tiny_qwen3(root / "teacher", num_hidden_layers=6, seed=1, **sizes)
    return student, teacher


def write_experts(folder: Path) -> Path:
    """A student whose every token goes to every expert: rounding cannot send it to another."""
    sizes = {"vocab_size": VOCABULARY, "initializer_range": 0.05, **WIDE}
    experts = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 128}
    return write_tiny_qwen3_moe(folder, **sizes, **experts)


def sampled() -> list[Rollout]:
    return rollouts(count=16, vocab=VOCABULARY)


def one_step(setting: Setting, device: torch.device) -> Outcome:
    """Loss and gradients of two microbatches; in a world of as many ranks as the setting's."""
    ranks = setting.context_parallel_size
    learner, master = (
        build(
            ModelConfig(
                str(folder),
                params_dtype=setting.params_dtype,
                fp8=fp8,
                context_parallel_size=ranks,
            ),
            ranks,
            owner=owner,
        )
        for owner, folder, fp8 in (
            ("student", setting.student, setting.fp8),
            ("teacher", setting.teacher, setting.teacher_fp8),
        )
    )
    # Not sharded: every rank is to have the whole gradient.
    trainable = make_trainable(learner, OptimizerConfig(use_distributed_optimizer=False), 10)
    dtype = master.config.params_dtype
    shard = head_shard(master.hf, learner.vocab_rows, 0, VOCABULARY, dtype)
    objective = Objective(LossConfig(), TeacherHead(shard.to(device), VOCABULARY))
    plan = plan_microbatches(sampled(), 2, multiple=SEQUENCE_MULTIPLE)
    plan = padded_for(ranks, sampled(), plan)
    batches = [pack(sampled(), plan, m, device) for m in range(2)]
    targets = ColocatedTeacher(master, learner.groups.layout, device).targets(sampled(), plan)
    # Delayed scales begin at 1, where most of a first microbatch's gradients are zeros to FP8.
    for _ in range(2 if setting.fp8.recipe == "delayed" else 1):
        sums = forward_backward(trainable, batches, targets, objective, LONGEST_PREFIX)
    return Outcome(sums.loss, sums.kl, _gradient(learner), _scales(learner))


def own_step(setting: Setting) -> Outcome:
    """On the GPU of this rank, in the fresh world that ``run_on_ranks`` gave it."""
    initialize_megatron(1)
    return one_step(setting, torch.device("cuda", dist.get_rank()))


def _gradient(model: MegatronModel) -> Tensor:
    """By common name: norms lie fused in Transformer Engine's linears and beside the local ones,
    experts side by side in its grouped ones and each by itself."""
    named = {_common_name(name): part for name, part in model.module.named_parameters()}
    return torch.cat([named[name].main_grad.float().flatten().cpu() for name in sorted(named)])


def _common_name(name: str) -> str:
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    if ".local_experts." in name:
        return re.sub(r"local_experts\.(\d+)\.(\w+)\.weight", r"\2.weight\1", name)
    return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


def _scales(model: MegatronModel) -> list[Tensor]:
    parts = {name: part for name, part in model.module.named_modules() if ".linear_" in name}
    states = (getattr(part, "fp8_meta", {}).get("scaling_fwd") for part in parts.values())
    return [state.scale.cpu() for state in states if hasattr(state, "amax_history")]


@torch.no_grad()
def prefix_logits(
    folder: Path,
    sequences: Sequence[Rollout],
    device: torch.device,
    params_dtype: str,
    together: bool,
) -> list[Tensor]:
    """fp32 logits [L_i, V] of each rollout's prefix, all packed into one row or each by itself."""
    model = build(ModelConfig(str(folder), params_dtype=params_dtype), 1, owner="student")
    groups = [list(sequences)] if together else [[each] for each in sequences]
    result: list[Tensor] = []
    for group in groups:
        plan = plan_microbatches(group, 1)
        batch = pack(group, plan, 0, device)
        (logits,) = run_schedule(
            model, model.module, [batch], lambda b, h, w: h.float() @ w.float().T, forward_only=True
        )
        lengths = [len(group[i].prefix_ids) for i in plan.members[0]]
        parts = dict(zip(plan.members[0], logits.split(lengths), strict=True))
        result += [parts[i][:, :VOCABULARY].cpu() for i in range(len(group))]
    return result


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))
