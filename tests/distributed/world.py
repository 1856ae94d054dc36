"""What the distributed tests run on each rank: models in a layout, and a few training steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_prefix.batch import MicrobatchPlan, pack, padded_for, plan_microbatches
from megatron_prefix.config import LossConfig, ModelConfig, OptimizerConfig
from megatron_prefix.layout import model_layout
from megatron_prefix.mcore.groups import build_groups, initialize_megatron
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.model import MegatronModel, build_model
from megatron_prefix.mcore.optimizer import TrainableStudent, make_trainable
from megatron_prefix.mcore.weights import hf_buckets, load_hf_weights
from megatron_prefix.student import Objective, forward_backward
from megatron_prefix.teacher import ColocatedTeacher, load_teacher_head
from megatron_prefix.types import PrefixBatch, Rollout
from megatron_prefix.weighing.prefix_sums import PrefixSums

CPU = torch.device("cpu")
MICROBATCHES = 4
LONGEST_PREFIX = 17


@dataclass(frozen=True)
class Case:
    """One layout of student and teacher."""

    student: ModelConfig
    teacher: ModelConfig
    # eps far above any gradient makes Adam linear: updates compare as gradients do, where Adam
    # itself would blow rounding of tiny gradients up to whole steps.
    optimizer: OptimizerConfig = OptimizerConfig(lr=1.0, adam_eps=1.0, clip_grad=0.0)
    total_steps: int = 100  # that the learning rate's schedule spans


@dataclass(frozen=True)
class Run:
    """What some steps left: on rank 0 the exported weights."""

    losses: list[float]
    grad_norms: list[float]
    kl: list[torch.Tensor]
    weights: dict[str, torch.Tensor]


def model_config(folder: Path, tp: int = 1, pp: int = 1, **settings: object) -> ModelConfig:
    return ModelConfig(
        hf_path=str(folder),
        params_dtype="fp32",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        **settings,
    )


def rollouts(count: int = 8, vocab: int = 62, seed: int = 0) -> list[Rollout]:
    """Prompts and prefixes of unlike lengths, one of a single token.

    Ids from 3 on: transformers zeroes the padding token's embedding and gives it no gradient.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab, (length,), generator=generator).tolist())

    lengths = [1 + 16 * i // max(1, count - 1) for i in range(count)]
    return [
        Rollout(ids(5 + i), ids(length), (0.0,) * length, "length", 0, i)
        for i, length in enumerate(lengths)
    ]


def build(config: ModelConfig, world_size: int, *, owner: str) -> MegatronModel:
    groups = build_groups(model_layout(config, world_size))
    hf = read_hf_model(config.hf_path)
    model = build_model(config, hf, groups, owner=owner, with_head=owner == "student")
    load_hf_weights(model)
    return model


@dataclass(frozen=True)
class World:
    """Student and teacher on this rank, ready to step."""

    student: TrainableStudent
    teacher: ColocatedTeacher
    objective: Objective

    @classmethod
    def build(cls, case: Case, world_size: int) -> "World":
        initialize_megatron(1)
        student = build(case.student, world_size, owner="student")
        teacher = build(case.teacher, world_size, owner="teacher")
        groups, head = student.groups, None
        if groups.is_last_stage:
            head = load_teacher_head(student, teacher.hf, teacher.config.params_dtype, CPU)
        trainable = make_trainable(student, case.optimizer, case.total_steps)
        objective = Objective(LossConfig(), head)
        offload = case.teacher.offload
        scorer = ColocatedTeacher(teacher, groups.layout, CPU, offload=offload)
        return cls(trainable, scorer, objective)

    def packed(
        self, sampled: Sequence[Rollout], *, multiple: int = 8, loss_start: int = 0
    ) -> tuple[MicrobatchPlan, list[PrefixBatch]]:
        """The plan of a step on ``sampled``, and the microbatches of this rank's replica."""
        groups = self.student.model.groups
        plan = plan_microbatches(sampled, MICROBATCHES, multiple=multiple, loss_start=loss_start)
        plan = padded_for(groups.layout.cp, sampled, plan)
        mine = plan.of_replica(groups.dp_rank, groups.layout.dp)
        return plan, [pack(sampled, plan, m, CPU) for m in mine]

    def step(self, sampled: Sequence[Rollout], *, multiple: int = 8) -> PrefixSums:
        plan, batches = self.packed(sampled, multiple=multiple)
        targets = self.teacher.targets(sampled, plan)
        return forward_backward(self.student, batches, targets, self.objective, LONGEST_PREFIX)

    def weights(self) -> dict[str, torch.Tensor]:
        # A bucket smaller than the model, so that several are made.
        whole: dict[str, torch.Tensor] = {}
        for bucket in hf_buckets(self.student.model, 1 << 14, torch.float32):
            names = {name for name, _ in bucket}
            for name in names:  # SGLang loads these two together or not at all
                joined = name.replace(".q_a_proj.", ".kv_a_proj_with_mqa.")
                assert joined in names, f"{name} travels without {joined}"
            whole |= {name: tensor.clone() for name, tensor in bucket}
        return whole


def train(case: Case, world_size: int, steps: int) -> Run:
    """``steps`` steps on fixed rollouts; call it on every rank."""
    world = World.build(case, world_size)
    losses, norms, kls = [], [], []
    for step in range(steps):
        sums = world.step(rollouts(seed=step))
        losses.append(sums.loss)
        kls.append(sums.kl)
        norms.append(world.student.update().grad_norm)
    return Run(losses, norms, kls, world.weights())
