from pathlib import Path

import pytest

from megatron_prefix.config import Recipe
from megatron_prefix.recipe import load_recipe
from megatron_prefix.scorers import load_scorer
from megatron_prefix.tasks import sort_chain

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_names_a_known_scorer(path: Path) -> None:
    recipe = load_recipe(str(path))
    assert isinstance(recipe, Recipe) and recipe.run.name
    assert callable(load_scorer(recipe.eval.scorer))


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
