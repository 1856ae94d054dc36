"""Every process group of a run waits as long as the recipe says, whoever made it, but for that of
the orders."""

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_prefix.assemble import assemble
from megatron_prefix.config import Recipe
from megatron_prefix.validate import validate
from tests.distributed.ranks import run_ranks
from tests.distributed.test_separate_teacher import a_recipe, root

__all__ = ["root"]  # the fixture
TIMEOUT_S = 97.5


def timeouts(recipe: Recipe) -> list[float]:
    """Of all groups that this rank is in, once a run is assembled."""
    dist.set_timeout(timedelta(seconds=TIMEOUT_S))  # as the worker makes the default one
    folder = Path(recipe.run.output_dir, recipe.run.name)
    with assemble(recipe, folder, [], lambda: False) as share:
        groups = list(c10d._world.pg_map)
        # The ranks meet here: a group that is torn down on one ends the other's start.
        share.train()
    backends = [group._get_backend(torch.device("cpu")) for group in groups]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_every_group_but_that_of_orders_has_the_recipes_timeout(root: Path) -> None:
    """Two ranks of the student, in two stages that share tied embeddings, and two of a teacher
    with experts."""
    experts = {"taught_by": "moe", "placement": "separate", "expert_model_parallel_size": 2}
    recipe = a_recipe(root, "timeouts", (1, 2), (1, 1), **experts)
    recipe = replace(
        recipe,
        run=replace(recipe.run, distributed_timeout_s=TIMEOUT_S),
        train=replace(recipe.train, steps=1),
    )
    world_size = validate(recipe).world_size
    assert world_size == 4
    for seconds in run_ranks(world_size, timeouts, recipe):
        assert len(seconds) > 20
        (longer,) = [each for each in seconds if each != TIMEOUT_S]
        assert longer > 24 * 3600  # watchdogs judge how long an order may take
