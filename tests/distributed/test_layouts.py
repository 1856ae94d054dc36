"""Every layout trains as one rank does: losses, gradient norms and updates of two steps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import run_ranks
from tests.distributed.world import Case, Run, model_config, train
from tests.tiny_models import write_tiny_llama, write_tiny_qwen3

STEPS = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    student = {"vocab_size": 62, "num_hidden_layers": 4, "num_key_value_heads": 4}
    student["initializer_range"] = 0.05  # wider logits alone would cost fp32 a digit
    teacher = {**student, "hidden_size": 96, "num_hidden_layers": 3, "head_dim": 24}
    return {
        "tied": write_tiny_qwen3(root / "tied", **student),
        "untied": write_tiny_qwen3(root / "untied", tie_word_embeddings=False, **student),
        "llama": write_tiny_llama(root / "llama", **student),
        "teacher": write_tiny_qwen3(root / "teacher", seed=1, **teacher),
        "llama_teacher": write_tiny_llama(root / "llama_teacher", seed=1, **teacher),
    }


def case(
    models: dict[str, Path],
    student: tuple[int, int] = (1, 1),
    teacher: tuple[int, int] = (1, 1),
    kind: str = "tied",
    **settings: object,
) -> Case:
    optimizer = Case.optimizer
    if "use_distributed_optimizer" in settings:
        optimizer = replace(optimizer, **settings)
        settings = {}
    taught_by = "llama_teacher" if kind == "llama" else "teacher"
    sequence_parallel = bool(settings.get("sequence_parallel"))
    return Case(
        model_config(models[kind], *student, **settings),
        model_config(models[taught_by], *teacher, sequence_parallel=sequence_parallel),
        optimizer,
    )


LAYOUTS = {
    "student tp2, teacher pp2": (2, {"student": (2, 1), "teacher": (1, 2)}),
    "student pp2, teacher tp2": (2, {"student": (1, 2), "teacher": (2, 1)}),
    "data parallel": (2, {}),
    "data parallel, plain optimizer": (2, {"use_distributed_optimizer": False}),
    "data parallel, teacher tp2": (2, {"teacher": (2, 1)}),
    "sequence parallel": (
        2,
        {"student": (2, 1), "teacher": (2, 1), "sequence_parallel": True},
    ),
    "tp2 pp2": (4, {"student": (2, 2), "teacher": (1, 2)}),
    "tp2 dp2, teacher pp2 dp2": (4, {"student": (2, 1), "teacher": (1, 2)}),
    "pp2 dp2, teacher tp4": (4, {"student": (1, 2), "teacher": (4, 1)}),
    "recompute": (2, {"student": (2, 1), "recompute_granularity": "full"}),
    "untied pp2": (2, {"student": (1, 2), "kind": "untied"}),
    "untied tp2": (2, {"student": (2, 1), "kind": "untied"}),
    "llama tp2": (2, {"student": (2, 1), "teacher": (1, 2), "kind": "llama"}),
    "llama pp4": (4, {"student": (1, 4), "kind": "llama"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_trains_as_one_rank_does(
    name: str, models: dict[str, Path], on_one_rank: Callable[[Case, int], Run]
) -> None:
    world_size, settings = LAYOUTS[name]
    kind = str(settings.get("kind", "tied"))
    one = on_one_rank(case(models, kind=kind), STEPS)
    ranks = run_ranks(world_size, train, case(models, **settings), world_size, STEPS)
    check_same_training(ranks, one, models[kind])


def check_same_training(ranks: list[Run], one: Run, student: Path) -> None:
    """Losses, gradient norms and weights of the ranks are those of one rank."""
    for run in ranks:
        assert run.losses == pytest.approx(one.losses, rel=1e-6)
        assert run.grad_norms == pytest.approx(one.grad_norms, rel=2e-6)
        for mine, reference in zip(run.kl, one.kl, strict=True):
            torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6)
    before = load_file(student / "model.safetensors")
    assert sorted(ranks[0].weights) == sorted(one.weights) == sorted(before)
    for key, start in before.items():
        update = one.weights[key] - start
        difference = (ranks[0].weights[key] - one.weights[key]).norm()
        # The weight itself is rounded to fp32 after its update: one unit in the last place.
        assert difference <= 5e-6 * update.norm() + 2**-23 * start.norm(), key
    assert not any(run.weights for run in ranks[1:])  # rank 0 alone holds what is exported
