"""``megatron-prefix plan``: validates, builds the modules of every stage, prints, and refuses what
does not fit."""

from collections.abc import Sequence
from dataclasses import replace

from megatron_prefix.config import Recipe
from megatron_prefix.jobs.cluster import Cluster
from megatron_prefix.modes import check_own_servers
from megatron_prefix.plan.build import count_held
from megatron_prefix.plan.fit import free_for_servers, measure_fit, refusal, with_remedy
from megatron_prefix.plan.make import Plan, make_plan
from megatron_prefix.plan.memory import RankPlan, Stage, plan_ranks
from megatron_prefix.plan.seen import Seen, look_at_prompts
from megatron_prefix.plan.servers import refuse_servers
from megatron_prefix.plan.sizes import ModelSizes
from megatron_prefix.plan.view import plan_json, print_plan
from megatron_prefix.types import Held
from megatron_prefix.validate import ValidRun, validate


def run_plan(recipe: Recipe, cluster: Cluster, *, as_json: bool, quick: bool) -> None:
    """Prints the plan. ValueError for a recipe that cannot be, or does not fit its cards; the plan
    is printed before the latter. ``quick``: bytes by arithmetic, no module is built."""
    plan = plan_recipe(recipe, cluster, quick=quick)
    if as_json:
        print(plan_json(plan))
    else:
        from rich.console import Console

        print_plan(plan, Console())
    if plan.fit and not plan.fit.fits:
        raise ValueError(refusal(plan.fit))
    refuse_servers(plan.teacher_servers, free_for_servers(recipe))


def plan_recipe(recipe: Recipe, cluster: Cluster, *, quick: bool) -> Plan:
    """The plan with its fit, and with the remedy where it does not."""
    read = ModelSizes()
    if cluster.world_size and not recipe.run.world_size:
        recipe = replace(recipe, run=replace(recipe.run, world_size=cluster.world_size))
    check_own_servers(recipe, cluster.servers(recipe.rollout))
    run = validate(recipe, read, sizes_only=not read.all_here(recipe))
    seen = look_at_prompts(run) if read.all_here(recipe) else Seen()
    plan = make_plan(run, seen, _held(run, quick))
    fit = measure_fit(recipe, plan.ranks, servers_elsewhere=cluster.server_nodes > 0)
    if fit and not fit.fits:

        def count(changed: ValidRun) -> Sequence[RankPlan]:
            return plan_ranks(changed, _held(changed, quick))

        fit = with_remedy(fit, run, read, count)
    return replace(plan, fit=fit, shapes=tuple(str(path) for path in read.from_shapes.values()))


def _held(run: ValidRun, quick: bool) -> dict[Stage, Held] | None:
    return None if quick else count_held(run)
