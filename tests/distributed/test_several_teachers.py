"""Each rollout learns from the teacher of its domain, wherever the teachers are."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prefix.config import Recipe, TrainConfig
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.rollout.records import save_rollouts
from megatron_prefix.types import Rollout
from megatron_prefix.validate import validate
from tests.distributed.test_separate_teacher import a_recipe, trained
from tests.distributed.world import model_config, rollouts
from tests.tiny_models import write_tiny_llama, write_tiny_qwen3

STEPS = 2
DOMAIN = "other"


def in_domains(step: int) -> list[Rollout]:
    """Three of eight are the other teacher's: no number of microbatches fits both."""
    return [
        replace(rollout, domain=DOMAIN if index % 3 == 0 else "")
        for index, rollout in enumerate(rollouts(vocab=264, seed=step))
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("several")
    write_tiny_qwen3(root / "student", vocab_size=264, num_key_value_heads=4)
    write_tiny_qwen3(root / "teacher", seed=1, vocab_size=272, hidden_size=96)
    write_tiny_llama(root / DOMAIN, seed=2, vocab_size=264, num_hidden_layers=3)
    for name in ("student", "teacher", DOMAIN):
        write_byte_tokenizer(root / name)
    for step in range(STEPS):
        mixed = in_domains(step)
        save_rollouts(root / "rollouts", step, mixed)
        for domain in ("", DOMAIN):
            alone = [replace(each, domain="") for each in mixed if each.domain == domain]
            save_rollouts(root / f"alone {domain}", step, alone)
    return root


def several(root: Path, name: str, placements: tuple[str, str], replicas: int = 1) -> Recipe:
    recipe = a_recipe(root, name, (1, 1), (1, 1), placement=placements[0])
    other = model_config(root / DOMAIN, placement=placements[1])
    ranks = replicas + placements.count("separate")
    return replace(
        recipe,
        run=replace(recipe.run, world_size=ranks),
        data=replace(recipe.data, domain_column="domain"),
        teachers={DOMAIN: other},
        train=replace(recipe.train, steps=STEPS),
    )


def test_the_loss_is_that_of_each_teacher_on_its_own_rollouts(root: Path) -> None:
    (mixed, *_) = trained(several(root, "mixed", ("colocated",) * 2), steps=STEPS).losses
    total = tokens = 0.0
    for domain, folder in (("", "teacher"), (DOMAIN, DOMAIN)):
        recipe = a_recipe(root, f"alone {domain}", (1, 1), (1, 1), taught_by=folder)
        alone = replace(
            recipe,
            rollout=replace(recipe.rollout, replay=str(root / f"alone {domain}")),
            train=TrainConfig(steps=1, global_batch_size=2, micro_batch_size=1),
        )
        own = [each for each in in_domains(0) if each.domain == domain]
        count = sum(len(each.prefix_ids) for each in own)
        total += trained(alone, steps=1).losses[0] * count
        tokens += count
    assert mixed == pytest.approx(total / tokens, rel=1e-6)


@pytest.mark.parametrize(
    ("placements", "replicas"),
    [(("colocated", "separate"), 2), (("separate", "separate"), 1)],
    ids=["one beside two students", "each on its own rank"],
)
def test_placements_do_not_matter(placements: tuple[str, str], replicas: int, root: Path) -> None:
    name = " ".join(placements)
    there = several(root, name, placements, replicas)
    assert validate(there).world_size == replicas + placements.count("separate")
    together = several(root, f"{name} together", ("colocated",) * 2, replicas)
    assert trained(there, steps=STEPS) == trained(together, steps=STEPS)
