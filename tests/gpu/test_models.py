"""Transformer Engine's student on one GPU: against transformers, and FP8 against bf16."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_prefix.config import Fp8Config, LossConfig, ModelConfig, OptimizerConfig
from megatron_prefix.types import TeacherHead
from tests.tiny_models import write_tiny_qwen3

pytestmark = pytest.mark.gpu
# Widths that FP8's 128x128 blocks divide.
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
VOCABULARY = 1024


@dataclass(frozen=True)
class Outcome:
    loss: float
    gradient: torch.Tensor  # fp32, flat


def sampled() -> list:
    from tests.distributed.world import rollouts

    return rollouts(count=16, vocab=VOCABULARY)


def one_step(student: Path, teacher: Path, fp8: Fp8Config, device: torch.device) -> Outcome:
    from megatron_prefix.batch import pack, plan_microbatches
    from megatron_prefix.mcore.fp8 import SEQUENCE_MULTIPLE
    from megatron_prefix.mcore.optimizer import make_trainable
    from megatron_prefix.mcore.weights import head_shard
    from megatron_prefix.student import Objective, forward_backward
    from megatron_prefix.teacher import ColocatedTeacher
    from tests.distributed.world import LONGEST_PREFIX, build

    learner = build(ModelConfig(hf_path=str(student), fp8=fp8), 1, owner="student")
    master = build(ModelConfig(hf_path=str(teacher)), 1, owner="teacher")
    trainable = make_trainable(learner, OptimizerConfig(), 10)
    shard = head_shard(master.hf, learner.vocab_rows, 0, VOCABULARY, torch.bfloat16)
    head = TeacherHead(shard.to(device), VOCABULARY)
    objective = Objective(LossConfig(), head)
    plan = plan_microbatches(sampled(), 2, multiple=SEQUENCE_MULTIPLE)
    batches = [pack(sampled(), plan, m, device) for m in range(2)]
    targets = ColocatedTeacher(master, learner.groups.layout, device).targets(sampled(), plan)
    sums = forward_backward(trainable, batches, targets, objective, LONGEST_PREFIX)
    gradient = [p.main_grad.float().flatten() for p in learner.module.parameters()]
    return Outcome(sums.loss, torch.cat(gradient).clone())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": VOCABULARY, "initializer_range": 0.05, **WIDE}
    student = write_tiny_qwen3(root / "student", num_hidden_layers=4, **sizes)
    teacher = write_tiny_qwen3(root / "teacher", num_hidden_layers=6, seed=1, **sizes)
    return student, teacher


def test_transformer_engine_is_what_runs(one_rank: torch.device) -> None:
    from megatron_prefix.mcore.model import uses_transformer_engine

    assert uses_transformer_engine()


def test_logits_equal_transformers_in_bf16(
    folders: tuple[Path, Path], one_rank: torch.device
) -> None:
    import transformers

    from megatron_prefix.batch import pack, plan_microbatches
    from megatron_prefix.mcore.schedule import run_schedule
    from tests.distributed.world import build

    model = build(ModelConfig(hf_path=str(folders[0])), 1, owner="student")
    plan = plan_microbatches(sampled(), 1)
    batch = pack(sampled(), plan, 0, one_rank)
    with torch.no_grad():
        (logits,) = run_schedule(
            model, model.module, [batch], lambda b, h, w: h.float() @ w.float().T, forward_only=True
        )
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folders[0], dtype=torch.float32
    ).to(one_rank)
    rows = []
    for rollout in (sampled()[i] for i in plan.members[0]):
        ids = torch.tensor([(*rollout.prompt_ids, *rollout.prefix_ids)[:-1]], device=one_rank)
        with torch.no_grad():
            rows.append(reference(ids).logits[0, len(rollout.prompt_ids) - 1 :])
    expected = torch.cat(rows)
    error = (logits[:, :VOCABULARY] - expected).norm() / expected.norm()
    assert error < 0.02


@pytest.mark.parametrize(
    "fp8",
    [
        Fp8Config("e4m3", "blockwise"),
        Fp8Config("hybrid", "tensorwise"),
        Fp8Config("hybrid", "delayed", first_last_layers_bf16=False),
    ],
    ids=lambda fp8: fp8.recipe,
)
def test_fp8_trunks_learn_as_bf16_does(
    fp8: Fp8Config, folders: tuple[Path, Path], one_rank: torch.device
) -> None:
    plain = one_step(*folders, Fp8Config(), one_rank)
    quantised = one_step(*folders, fp8, one_rank)
    assert quantised.loss == pytest.approx(plain.loss, rel=0.01)
    cosine = torch.nn.functional.cosine_similarity(plain.gradient, quantised.gradient, dim=0)
    assert cosine > 0.99
