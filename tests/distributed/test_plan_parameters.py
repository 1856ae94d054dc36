"""The plan's bytes a rank are those that Megatron-Core allocates, to the last one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.mcore.census import Question, take_census
from megatron_prefix.mcore.groups import ModelGroups, initialize_megatron, world_of
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.model import build_model
from megatron_prefix.mcore.optimizer import TrainableStudent, make_trainable
from megatron_prefix.modes import teachers_of
from megatron_prefix.plan import Stage, count_held, make_plan
from megatron_prefix.plan.build import question
from megatron_prefix.plan.teachers import teachers_that_score
from megatron_prefix.rollout.records import rollout_file
from megatron_prefix.types import Held
from megatron_prefix.validate import ValidRun, validate
from megatron_prefix.world import build_objective, join
from tests.distributed.ranks import run_ranks
from tests.distributed.world import CPU, model_config
from tests.tiny_models import (
    write_tiny_deepseek_v2,
    write_tiny_deepseek_v3,
    write_tiny_gpt_oss,
    write_tiny_llama,
    write_tiny_mixtral,
    write_tiny_qwen3,
    write_tiny_qwen3_moe,
)


@dataclass(frozen=True)
class Allocated:
    """On one rank after one step of the optimizer."""

    student: Held | None  # where it has a part of it
    teachers: dict[str, Held]  # by domain, those of which it has a part
    heads: int  # bytes of all teachers' LM heads


def allocated(recipe: Recipe) -> Allocated:
    initialize_megatron(0)
    world = join(recipe)
    teachers = {
        domain: scored(teachers_of(recipe)[domain], groups)
        for domain, groups in world.teachers.items()
    }
    if world.student is None:
        return Allocated(None, teachers, 0)
    with world_of(world.student):
        hf = read_hf_model(recipe.student.hf_path)
        student = build_model(recipe.student, hf, world.student, owner="student", with_head=True)
        objective = build_objective(recipe, student, CPU)
        first = [objective.teacher_head] if objective.teacher_head else []
        heads = [head.weight for head in (*first, *objective.more_heads.values())]
        trainable = make_trainable(student, recipe.optimizer, 1)
        trainable.zero_grad()
        assert trainable.update().updated
        return Allocated(student_held(trainable), teachers, nbytes(heads))


def scored(config: ModelConfig, groups: ModelGroups) -> Held:
    hf = read_hf_model(config.hf_path)
    teacher = build_model(config, hf, groups, owner="teacher", with_head=False)
    parameters = list(teacher.module.parameters())
    return Held(sum(p.numel() for p in parameters), nbytes(parameters))


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


def test_plan_of_several_teachers_equals_what_is_allocated(tmp_path: Path) -> None:
    """Two beside the student, one of them offloaded, and one on a rank of its own; the student has
    a first, a middle and a last stage."""
    write_tiny_qwen3(tmp_path / "student", vocab_size=265, num_hidden_layers=3)
    write_tiny_llama(tmp_path / "teacher", vocab_size=272, num_hidden_layers=3)
    write_tiny_qwen3_moe(tmp_path / "math", vocab_size=265)
    write_tiny_qwen3(tmp_path / "code", vocab_size=272, hidden_size=96)
    recipe = recipe_of(
        tmp_path,
        model_config(tmp_path / "student", pp=3),
        model_config(tmp_path / "teacher", pp=3, offload=True),
        world=4,
    )
    teachers = {
        "math": model_config(tmp_path / "math", expert_model_parallel_size=1),
        "code": model_config(tmp_path / "code", placement="separate"),
    }
    for name in teachers:
        write_byte_tokenizer(tmp_path / name)
    data = replace(recipe.data, domain_column="domain")
    check_plan(replace(recipe, data=data, teachers=teachers))


@pytest.mark.parametrize("sharded", [True, False])
def test_plan_of_bf16_knows_the_fp32_copies(sharded: bool, tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path / "student", vocab_size=265, tie_word_embeddings=False)
    write_tiny_llama(tmp_path / "teacher", vocab_size=272)
    student = replace(model_config(tmp_path / "student"), params_dtype="bf16")
    recipe = recipe_of(tmp_path, student, model_config(tmp_path / "teacher"), 2)
    optimizer = OptimizerConfig(use_distributed_optimizer=sharded)
    check_plan(replace(recipe, optimizer=optimizer))


@pytest.mark.parametrize(
    "settings",
    [{"pp": 2}, {"tp": 2, "sequence_parallel": True}, {"context_parallel_size": 2}],
)
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


def test_plan_of_sinks_and_of_experts_cut_and_spread_equals_what_is_allocated(
    tmp_path: Path,
) -> None:
    write_tiny_mixtral(tmp_path / "student", vocab_size=265)
    write_tiny_gpt_oss(tmp_path / "teacher", vocab_size=272)
    layout = {"tp": 2, "sequence_parallel": True, "expert_model_parallel_size": 2}
    whole = {"expert_tensor_parallel_size": 1}
    student = model_config(tmp_path / "student", **layout)
    recipe = recipe_of(tmp_path, student, model_config(tmp_path / "teacher", **layout, **whole), 4)
    check_plan(recipe)


def recipe_of(folder: Path, student: ModelConfig, teacher: ModelConfig, world: int = 0) -> Recipe:
    for name in ("student", "teacher"):
        write_byte_tokenizer(folder / name)
    (folder / "replay").mkdir()
    rollout_file(folder / "replay", 0).touch()
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
    assert census_in_a_fork(every_rank(run)) == [held for rank in real for held in parts(rank)]
    for place, there, counted in zip(plan.ranks, real, roughly.ranks, strict=True):
        student = there.student or Held(0, 0)
        assert place.student_parameters == student.parameters == counted.student_parameters
        assert place.student_weights == student.weights
        assert place.student_gradients == student.gradients
        assert place.student_optimizer == student.optimizer
        # By arithmetic, shards of the optimizer miss the padding between parameters.
        assert counted.student_optimizer == pytest.approx(student.optimizer, rel=0.01)
        teachers = {part.domain: part.weights for part in place.teachers}
        assert teachers == {domain: held.weights for domain, held in there.teachers.items()}
        assert counted.teacher_weights == place.teacher_weights
        assert place.teacher_head == there.heads


def parts(rank: Allocated) -> list[Held]:
    return ([rank.student] if rank.student else []) + list(rank.teachers.values())


def every_rank(run: ValidRun) -> list[Question]:
    """The question of each model's part on each rank."""
    asked = []
    models = {Stage("student", 0): run.student}
    models |= {Stage("teacher", 0, name): each for name, each in teachers_that_score(run).items()}
    for rank in range(run.world_size):
        for kind, model in models.items():
            if rank in model.layout.ranks:
                stage = replace(kind, number=model.layout.coordinates(rank)[2])
                asked.append(question(run, stage, rank))
    return asked
