"""A teacher on ranks of its own teaches as one on the student's ranks does, to the last bit."""

import json
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_prefix.assemble import assemble
from megatron_prefix.batch import plan_microbatches
from megatron_prefix.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    PrefixConfig,
    Recipe,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.layout import Layout
from megatron_prefix.placement import IN_FLIGHT, WorldLayout
from megatron_prefix.rollout.records import save_rollouts
from megatron_prefix.run_files.jsonl import METRICS
from megatron_prefix.teacher import Link, SeparateTeacher, TeacherLost
from megatron_prefix.validate import validate
from tests.distributed.ranks import run_ranks
from tests.distributed.world import CPU, LONGEST_PREFIX, model_config, rollouts
from tests.tiny_models import write_tiny_qwen3, write_tiny_qwen3_moe

STEPS, STOP_AFTER = 4, 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("separate")
    student = {"vocab_size": 264, "num_hidden_layers": 4, "num_key_value_heads": 4}
    write_tiny_qwen3(root / "student", **student)
    teacher = {**student, "vocab_size": 272, "hidden_size": 96, "num_hidden_layers": 3}
    write_tiny_qwen3(root / "teacher", seed=1, tie_word_embeddings=False, **teacher)
    write_tiny_qwen3_moe(root / "moe", seed=1, vocab_size=272)
    for name in ("student", "teacher", "moe"):
        write_byte_tokenizer(root / name)
    for step in range(STEPS):
        save_rollouts(root / "rollouts", step, rollouts(vocab=264, seed=step))
    return root


def a_recipe(
    root: Path,
    name: str,
    student: tuple[int, int],
    teacher: tuple[int, int],
    *,
    taught_by: str = "teacher",
    **settings: object,
) -> Recipe:
    """``settings`` are the teacher's: its placement, its ranks."""
    return Recipe(
        run=RunConfig(name=name, output_dir=str(root / "runs")),
        student=model_config(root / "student", *student),
        teacher=model_config(root / taught_by, *teacher, **settings),
        data=DataConfig(max_prompt_length=64),
        prefix=PrefixConfig("fixed", LONGEST_PREFIX, LONGEST_PREFIX),
        rollout=RolloutConfig(replay=str(root / "rollouts")),
        optimizer=OptimizerConfig(lr=1e-3),
        train=TrainConfig(steps=STEPS, global_batch_size=8, micro_batch_size=2),
        checkpoint=CheckpointConfig(export_hf=False),
        log=LogConfig(tensorboard=False, sample_rollouts_interval=0),
    )


@dataclass(frozen=True)
class Seen:
    losses: list[float]
    grad_norms: list[float]


def train_to(recipe: Recipe, stop_after: int) -> bool:
    """On one rank; rank 0 is asked to stop once ``stop_after`` steps are done."""
    folder = Path(recipe.run.output_dir, recipe.run.name)

    def stop() -> bool:
        metrics = folder / METRICS
        return metrics.exists() and len(metrics.read_text().splitlines()) >= stop_after

    with assemble(recipe, folder, [], stop) as share:
        return share.train()


def trained(recipe: Recipe, stop_after: int = STEPS + 1, steps: int = STEPS) -> Seen:
    """What the run's log holds after it, on as many ranks as the recipe needs."""
    world_size = validate(recipe).world_size
    finished = run_ranks(world_size, train_to, recipe, stop_after)
    assert finished == [stop_after > steps] * world_size
    lines = Path(recipe.run.output_dir, recipe.run.name, METRICS).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return Seen([r["loss"] for r in records], [r["grad_norm"] for r in records])


@pytest.mark.parametrize(
    ("first", "student", "teacher"),
    [
        ("separate", (2, 1), (1, 2)),
        ("colocated", (2, 1), (1, 2)),
        ("separate", (1, 2), (2, 1)),
    ],
)
def test_a_run_goes_on_with_its_teacher_elsewhere_to_the_last_bit(
    first: str, student: tuple[int, int], teacher: tuple[int, int], root: Path
) -> None:
    """Stopped after two steps, resumed with the other placement; against a colocated run."""
    then = {"separate": "colocated", "colocated": "separate"}[first]
    name = f"{first} pp{student[1]}"
    whole = trained(a_recipe(root, f"whole {name}", student, teacher))
    assert len(set(whole.losses)) == STEPS
    recipes = {
        placement: a_recipe(root, name, student, teacher, placement=placement)
        for placement in (first, then)
    }
    assert validate(recipes["separate"]).world_size == 4
    trained(recipes[first], STOP_AFTER)
    assert trained(recipes[then]) == whole


def test_one_teacher_replica_serves_several_of_the_students(root: Path) -> None:
    """Two data-parallel students; and a teacher of two replicas for one student."""
    two = a_recipe(root, "dp2", (1, 1), (1, 1))
    two = replace(two, run=replace(two.run, world_size=2))
    beside = a_recipe(root, "dp2 beside", (1, 1), (1, 1), placement="separate")
    beside = replace(beside, run=replace(beside.run, world_size=3))
    assert trained(beside) == trained(two)
    one = a_recipe(root, "one", (1, 1), (1, 1))
    replicas = a_recipe(root, "replicas", (1, 1), (1, 1), placement="separate", world_size=2)
    assert trained(replicas) == trained(one)


def test_experts_of_a_separate_teacher_share_their_ranks(root: Path) -> None:
    sizes = {"taught_by": "moe", "expert_model_parallel_size": 2}
    together = a_recipe(root, "moe", (1, 1), (1, 1), **sizes)
    beside = a_recipe(root, "moe beside", (1, 1), (1, 1), placement="separate", **sizes)
    assert validate(beside).world_size == 3
    assert trained(beside).losses == pytest.approx(trained(together).losses, rel=1e-6)


def test_both_may_be_cut_over_context_parallel_ranks(root: Path) -> None:
    cut = {"context_parallel_size": 2}
    recipes = [
        replace(recipe, student=replace(recipe.student, **cut))
        for recipe in (
            a_recipe(root, "cp", (1, 1), (1, 1), **cut),
            a_recipe(root, "cp beside", (1, 1), (1, 1), placement="separate", **cut),
        )
    ]
    assert [validate(recipe).world_size for recipe in recipes] == [2, 4]
    together, beside = map(trained, recipes)
    assert beside == together


def wait_for_nothing() -> str:
    """On the student's rank: the error where the teacher's, rank 1, is there and never sends."""
    layout = WorldLayout(Layout(1, 1, 1), {"": Layout(1, 1, 1, first_rank=1)})
    group = dist.new_group(timeout=timedelta(seconds=1))
    message = ""
    if dist.get_rank() == 0:
        teacher = SeparateTeacher(Link(group, layout, CPU, torch.float32, 8))
        sampled = rollouts()
        with pytest.raises(TeacherLost) as lost:
            next(iter(teacher.targets(sampled, plan_microbatches(sampled, 4))))
        message = str(lost.value)
    dist.barrier()
    return message


def test_a_teacher_that_does_not_answer_is_named_after_the_timeout() -> None:
    message, _ = run_ranks(2, wait_for_nothing)
    assert message.startswith("no hidden states of microbatch 0 from the teacher's rank 1: it died")


@dataclass
class _Alive:
    """Of the hidden states that a rank sends or receives: how many there were, and at once."""

    storages: list[weakref.ref]
    most: int = 0

    def count(self, post: Callable[..., object]) -> Callable[..., object]:
        def counted(hidden: torch.Tensor, *peer: object, **settings: object) -> object:
            if hidden.dim() == 2:
                self.storages.append(weakref.ref(hidden.untyped_storage()))
                alive = sum(storage() is not None for storage in self.storages)
                self.most = max(self.most, alive)
            return post(hidden, *peer, **settings)

        return counted


def hidden_states_alive(recipe: Recipe) -> tuple[int, int]:
    alive = _Alive([])
    dist.isend, dist.irecv = alive.count(dist.isend), alive.count(dist.irecv)
    train_to(recipe, 1)
    return len(alive.storages), alive.most


def test_few_hidden_states_are_alive_however_many_microbatches(root: Path) -> None:
    """Of eight: those posted or on their way, and the one that is scored or learnt from."""
    recipe = a_recipe(root, "alive", (1, 1), (1, 1), placement="separate")
    recipe = replace(recipe, train=replace(recipe.train, steps=1, micro_batch_size=1))
    for microbatches, most in run_ranks(2, hidden_states_alive, recipe):
        assert microbatches == 8
        assert most <= IN_FLIGHT + 1
