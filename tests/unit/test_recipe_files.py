from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prefix.config import Recipe
from megatron_prefix.evaluation.scorers import load_scorer
from megatron_prefix.jobs.cluster import Cluster
from megatron_prefix.plan import ModelSizes, Plan, plan_recipe
from megatron_prefix.plan.stages import whole_parameters
from megatron_prefix.recipe import factory_beside, load_recipe, write_own_data
from megatron_prefix.tasks import sort_chain

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_names_a_known_scorer(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert isinstance(recipe, Recipe) and recipe.run.name
    assert callable(load_scorer(recipe.eval.scorer))


def planned(path: Path, *, quick: bool) -> Plan:
    recipe, beside = load_recipe(str(path)), factory_beside(str(path), "cluster")
    if not (
        recipe.data.path and Path(recipe.data.path).exists()
    ):  # the user's to name, or made by its own write_data()
        recipe = replace(recipe, data=replace(recipe.data, path="some/hub-id"))
        recipe = replace(recipe, eval=replace(recipe.eval, path=""))
    if not recipe.student.hf_path:
        model = replace(recipe.student, hf_path="models/Qwen3-8B")
        recipe = replace(recipe, student=model, teacher=model)
    return plan_recipe(recipe, beside() if beside else Cluster(), quick=quick)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_planned_and_fits(path: Path) -> None:
    plan = planned(path, quick=True)
    assert plan.cost.run.flops.total > 0
    if plan.recipe.run.gpu_memory_gib:
        assert plan.fit and plan.fit.fits


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_r1_to_8b_16x8xh100_fp8",
        *(
            pytest.param(name, marks=pytest.mark.on_request)  # ten seconds each
            for name in (
                "qwen3_235b_to_qwen3_8b_4x8xh200_bf16",
                "qwen3_32b_to_qwen3_8b_8xh100_bf16",
            )
        ),
    ],
)
def test_the_modules_of_a_recipe_at_real_scale_are_built_on_no_memory(name: str) -> None:
    path = next(path for path in RECIPES if path.stem == name)
    plan, roughly = planned(path, quick=False), planned(path, quick=True)
    assert plan.built and plan.fit and plan.fit.fits
    for rank, counted in zip(plan.ranks, roughly.ranks, strict=True):
        assert rank.total > 0
        assert rank.student_parameters == counted.student_parameters
        # Buffers of gradients and of the optimizer are padded.
        assert rank.held == pytest.approx(counted.held, rel=1e-3)


@pytest.mark.parametrize(
    ("shapes", "parameters"),
    [
        ("Qwen3-8B", 8.19e9),
        ("Qwen3-32B", 32.76e9),
        ("Qwen3-235B-A22B", 235.09e9),
        ("DeepSeek-R1", 671.03e9),
    ],
)
def test_shapes_come_to_the_published_parameters(shapes: str, parameters: float) -> None:
    hf = ModelSizes()(f"models/{shapes}", "teacher")
    assert whole_parameters(hf) == pytest.approx(parameters, rel=1e-3)


def test_the_quickstart_is_the_tasks_own_setting() -> None:
    recipe = load_recipe("quickstart")
    assert (recipe.prefix.policy, recipe.prefix.anchored.every) == ("anchored", 8)
    assert (recipe.prefix.min_length, recipe.prefix.max_length) == (9, 75)
    assert (recipe.train.steps, recipe.train.global_batch_size) == (200, 32)
    assert recipe.optimizer.min_lr == pytest.approx(0.1 * recipe.optimizer.lr)
    assert recipe.data.path == str(sort_chain.data_files(".cache/sort_chain").train)
    assert recipe.data.max_prompt_length == 14 and recipe.eval.samples == 500
    assert Path(recipe.student.hf_path, "config.json").is_file()
    assert Path(recipe.teacher.hf_path, "config.json").is_file()


def test_the_quickstart_writes_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_own_data("quickstart")
    recipe = load_recipe("quickstart")
    assert len(Path(recipe.data.path).read_text().splitlines()) == 8192
    assert len(Path(recipe.eval.path).read_text().splitlines()) == recipe.eval.samples
    write_own_data("gsm8k_bytes")  # has none: its data is the user's
