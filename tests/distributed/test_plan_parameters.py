"""The plan's parameters a rank are those that Megatron-Core builds."""

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_prefix.config import (
    DataConfig,
    ModelConfig,
    PrefixConfig,
    Recipe,
    RolloutConfig,
    TrainConfig,
)
from megatron_prefix.layout import model_layout
from megatron_prefix.mcore.groups import build_groups, initialize_megatron
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.model import build_model
from megatron_prefix.mcore.weights import head_shard
from megatron_prefix.plan import make_plan
from megatron_prefix.tokenizers import write_byte_tokenizer
from megatron_prefix.validate import validate
from tests.distributed.ranks import run_ranks
from tests.distributed.world import model_config
from tests.tiny_models import (
    write_tiny_llama,
    write_tiny_mixtral,
    write_tiny_qwen3,
    write_tiny_qwen3_moe,
)


def built(recipe: Recipe) -> tuple[int, int, int]:
    """On one rank: the student's parameters, the teacher's bytes, the teacher's head's bytes."""
    initialize_megatron(0)
    models = {}
    for owner in ("student", "teacher"):
        config = getattr(recipe, owner)
        groups = build_groups(model_layout(config, dist.get_world_size()))
        hf = read_hf_model(config.hf_path)
        models[owner] = build_model(config, hf, groups, owner=owner, with_head=owner == "student")
    student, teacher = models["student"], models["teacher"]
    head = 0
    if student.groups.is_last_stage:
        vocab = student.hf.shape.vocab_size
        shard = head_shard(
            teacher.hf,
            student.vocab_rows,
            student.groups.tp_rank,
            vocab,
            teacher.config.params_dtype,
        )
        head = shard.numel() * shard.element_size()
    return (
        sum(parameter.numel() for parameter in student.module.parameters()),
        sum(p.numel() * p.element_size() for p in teacher.module.parameters()),
        head,
    )


@pytest.mark.parametrize(
    ("student", "teacher"), [((2, 1), (1, 2)), ((1, 2), (2, 1)), ((2, 2), (1, 2))]
)
def test_plan_equals_what_is_built(
    student: tuple[int, int], teacher: tuple[int, int], tmp_path: Path
) -> None:
    write_tiny_qwen3(tmp_path / "student", vocab_size=265)
    write_tiny_llama(tmp_path / "teacher", vocab_size=272, num_hidden_layers=3)
    check_plan(
        tmp_path,
        model_config(tmp_path / "student", *student),
        model_config(tmp_path / "teacher", *teacher),
    )


@pytest.mark.parametrize("settings", [{"pp": 2}, {"tp": 2, "sequence_parallel": True}])
def test_plan_of_experts_equals_what_is_built(settings: dict, tmp_path: Path) -> None:
    write_tiny_qwen3_moe(tmp_path / "student", vocab_size=265, mlp_only_layers=[0])
    write_tiny_mixtral(tmp_path / "teacher", vocab_size=272)
    experts = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    check_plan(
        tmp_path,
        model_config(tmp_path / "student", **settings, **experts),
        model_config(tmp_path / "teacher", **experts),
    )


def check_plan(tmp_path: Path, student: ModelConfig, teacher: ModelConfig) -> None:
    for name in ("student", "teacher"):
        write_byte_tokenizer(tmp_path / name)
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "some").touch()
    recipe = Recipe(
        student=student,
        teacher=teacher,
        data=DataConfig(max_prompt_length=64),
        prefix=PrefixConfig("fixed", 9, 75),
        rollout=RolloutConfig(replay=str(tmp_path / "replay")),
        train=TrainConfig(steps=10, global_batch_size=8, micro_batch_size=2),
    )
    plan = make_plan(validate(recipe))
    found = run_ranks(plan.world_size, built, recipe)
    planned = [
        (rank.student_parameters, rank.teacher_weights, rank.teacher_head) for rank in plan.ranks
    ]
    assert found == planned
