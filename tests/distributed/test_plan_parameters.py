"""The plan's bytes a rank are those that Megatron-Core allocates, to the last one."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_prefix.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrefixConfig,
    Recipe,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_prefix.layout import model_layout
from megatron_prefix.mcore.census import Question, take_census
from megatron_prefix.mcore.groups import build_groups, initialize_megatron
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.model import build_model
from megatron_prefix.mcore.optimizer import TrainableStudent, make_trainable
from megatron_prefix.mcore.weights import head_shard
from megatron_prefix.plan import Stage, count_held, make_plan
from megatron_prefix.plan.build import question
from megatron_prefix.tokenizers import write_byte_tokenizer
from megatron_prefix.types import Held
from megatron_prefix.validate import ValidRun, validate
from tests.distributed.ranks import run_ranks
from tests.distributed.world import model_config
from tests.tiny_models import (
    write_tiny_deepseek_v2,
    write_tiny_deepseek_v3,
    write_tiny_llama,
    write_tiny_mixtral,
    write_tiny_qwen3,
    write_tiny_qwen3_moe,
)


def allocated(recipe: Recipe) -> tuple[Held, Held, int]:
    """On one rank after one step of the optimizer: what the student and the teacher hold, and the
    bytes of the teacher's head."""
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
    trainable = make_trainable(student, recipe.optimizer, 1)
    trainable.zero_grad()
    assert trainable.update().updated
    parameters = list(teacher.module.parameters())
    scored = Held(sum(p.numel() for p in parameters), nbytes(parameters))
    return student_held(trainable), scored, head


def student_held(student: TrainableStudent) -> Held:
    parameters = list(student.ddp.parameters())
    buffers = [*student.ddp.buffers, *student.ddp.expert_parallel_buffers]
    weights = nbytes(parameters)
    inner = [each.optimizer for each in student.optimizer.chained_optimizers]
    states = [tensors(state) for each in inner for state in each.state.values()]
    masters = [p for each in inner for group in each.param_groups for p in group["params"]]
    return Held(
        parameters=sum(p.numel() for p in parameters),
        weights=weights,
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=nbytes([*parameters, *masters]) - weights + nbytes(sum(states, [])),
    )


def tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in state.values() if torch.is_tensor(value)]


def nbytes(held: Sequence[torch.Tensor]) -> int:
    """Of the memory behind them, each once."""
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values()
    )


def census_in_a_fork(questions: Sequence[Question]) -> list[Held]:
    """Megatron is imported here already: no fresh process need do so."""
    return run_ranks(1, after_leaving_the_world, questions)[0]


def after_leaving_the_world(questions: Sequence[Question]) -> list[Held]:
    dist.destroy_process_group()
    counted = take_census(questions)
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=1)
    return counted


@pytest.mark.parametrize(
    ("student", "teacher", "world"),
    [((2, 1), (1, 2), 2), ((1, 2), (2, 1), 2), ((2, 2), (1, 2), 4), ((1, 1), (1, 1), 3)],
)
def test_plan_equals_what_is_allocated(
    student: tuple[int, int], teacher: tuple[int, int], world: int, tmp_path: Path
) -> None:
    write_tiny_qwen3(tmp_path / "student", vocab_size=265)
    write_tiny_llama(tmp_path / "teacher", vocab_size=272, num_hidden_layers=3)
    recipe = recipe_of(
        tmp_path,
        model_config(tmp_path / "student", *student),
        model_config(tmp_path / "teacher", *teacher),
        world,
    )
    check_plan(recipe)


@pytest.mark.parametrize("sharded", [True, False])
def test_plan_of_bf16_knows_the_fp32_copies(sharded: bool, tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path / "student", vocab_size=265, tie_word_embeddings=False)
    write_tiny_llama(tmp_path / "teacher", vocab_size=272)
    student = replace(model_config(tmp_path / "student"), params_dtype="bf16")
    recipe = recipe_of(tmp_path, student, model_config(tmp_path / "teacher"), 2)
    optimizer = OptimizerConfig(use_distributed_optimizer=sharded)
    check_plan(replace(recipe, optimizer=optimizer))


@pytest.mark.parametrize("settings", [{"pp": 2}, {"tp": 2, "sequence_parallel": True}])
def test_plan_of_experts_equals_what_is_allocated(settings: dict, tmp_path: Path) -> None:
    write_tiny_qwen3_moe(tmp_path / "student", vocab_size=265, mlp_only_layers=[0])
    write_tiny_mixtral(tmp_path / "teacher", vocab_size=272)
    experts = {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    student = model_config(tmp_path / "student", **settings, **experts)
    check_plan(recipe_of(tmp_path, student, model_config(tmp_path / "teacher", **experts)))


def test_plan_of_latent_attention_equals_what_is_allocated(tmp_path: Path) -> None:
    write_tiny_deepseek_v3(tmp_path / "student", vocab_size=265)
    write_tiny_deepseek_v2(tmp_path / "teacher", vocab_size=272, q_lora_rank=None)
    layout = {"tp": 2, "sequence_parallel": True}
    layout |= {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}
    student = model_config(tmp_path / "student", **layout)
    check_plan(recipe_of(tmp_path, student, model_config(tmp_path / "teacher", pp=2)))


def recipe_of(folder: Path, student: ModelConfig, teacher: ModelConfig, world: int = 0) -> Recipe:
    for name in ("student", "teacher"):
        write_byte_tokenizer(folder / name)
    (folder / "replay").mkdir()
    (folder / "replay" / "some").touch()
    return Recipe(
        run=RunConfig(world_size=world),
        student=student,
        teacher=teacher,
        data=DataConfig(max_prompt_length=64),
        prefix=PrefixConfig("fixed", 9, 75),
        rollout=RolloutConfig(replay=str(folder / "replay")),
        train=TrainConfig(steps=10, global_batch_size=24, micro_batch_size=2),
    )


def check_plan(recipe: Recipe) -> None:
    run = validate(recipe)
    plan = make_plan(run, held=count_held(run, census_in_a_fork))
    roughly = make_plan(run)
    assert plan.built and not roughly.built
    real = run_ranks(plan.world_size, allocated, recipe)
    assert census_in_a_fork(every_rank(run)) == [held for rank in real for held in rank[:2]]
    for place, (student, teacher, head), counted in zip(
        plan.ranks, real, roughly.ranks, strict=True
    ):
        assert place.student_parameters == student.parameters == counted.student_parameters
        assert place.student_weights == student.weights
        assert place.student_gradients == student.gradients
        if place.student_at[:2] == (0, 0):
            assert place.student_optimizer == student.optimizer
        # Shards of the optimizer differ by the padding between parameters, 64 elements each.
        assert place.student_optimizer == pytest.approx(student.optimizer, rel=0.01)
        assert place.teacher_weights == teacher.weights == counted.teacher_weights
        assert place.teacher_head == head


def every_rank(run: ValidRun) -> list[Question]:
    """The student's and the teacher's question of each."""
    asked = []
    for rank in range(run.world_size):
        for owner, model in (("student", run.student), ("teacher", run.teacher)):
            stage = Stage(owner, model.layout.coordinates(rank)[2])
            asked.append(question(run, stage, rank))
    return asked
