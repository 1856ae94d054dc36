"""The models of the recipes at real scale, cut down to one layer of their own proportions, take a
training step in Megatron."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_prefix.config import Fp8Config, ModelConfig
from megatron_prefix.plan.sizes import SHAPES
from megatron_prefix.recipe import load_recipe
from tests.distributed.ranks import run_ranks
from tests.distributed.world import Case, World, rollouts

RECIPES = Path(__file__).parents[2] / "recipes"
NARROWER = 32  # times, in every width; heads and experts keep their numbers
WIDTHS = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "head_dim",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
RANKS = 2


def at_real_scale() -> list[str]:
    return sorted(
        path.stem
        for path in RECIPES.glob("*.py")
        if load_recipe(str(path)).run.gpu_memory_gib and path.stem != "__init__"
    )


def one_layer(hf_path: str, folder: Path) -> Path:
    """A random checkpoint of one layer by the shapes of a published model."""
    shapes = next(path for path in SHAPES if path.is_dir()) / f"{Path(hf_path).name}.json"
    config: dict[str, Any] = json.loads(shapes.read_text())
    # A rotary embedding needs two pairs for its interpolation to say anything.
    config |= {key: max(4, config[key] // NARROWER) for key in WIDTHS if key in config}
    config |= {"num_hidden_layers": 1, "vocab_size": 512, "num_nextn_predict_layers": 0}
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = 0
    name = config["architectures"][0].removesuffix("ForCausalLM")
    torch.manual_seed(0)
    hf = getattr(transformers, f"{name}Config")(**config)
    getattr(transformers, f"{name}ForCausalLM")(hf).float().save_pretrained(folder)
    return folder


def on_two_ranks(model: ModelConfig, folder: Path) -> ModelConfig:
    """The recipe's layout as far as two ranks and one layer go."""
    return replace(
        model,
        hf_path=str(folder),
        tensor_model_parallel_size=min(model.tensor_model_parallel_size, RANKS),
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=min(model.expert_model_parallel_size, RANKS),
        params_dtype="fp32",
        fp8=Fp8Config(),
        placement="colocated",
        world_size=0,
    )


def step(case: Case) -> tuple[float, float]:
    world = World.build(case, RANKS)
    loss = world.step(rollouts()).loss
    return loss, world.student.update().grad_norm


@pytest.mark.parametrize("name", at_real_scale())
def test_one_layer_of_each_model_takes_a_step(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    student, teacher = (
        on_two_ranks(model, one_layer(model.hf_path, tmp_path / owner))
        for owner, model in (("student", recipe.student), ("teacher", recipe.teacher))
    )
    results = run_ranks(RANKS, step, Case(student, teacher))
    for loss, grad_norm in results:
        assert math.isfinite(loss) and loss > 0
        assert math.isfinite(grad_norm) and grad_norm > 0


def test_there_are_recipes_at_real_scale() -> None:
    assert len(at_real_scale()) == 3
