"""What a plan took for granted, in sentences below its tables."""

from collections.abc import Iterator
from pathlib import Path

from megatron_prefix.plan.fit import GIB, Fit, free_for_servers
from megatron_prefix.plan.make import Plan
from megatron_prefix.plan.memory import on_gpus
from megatron_prefix.plan.servers import servers_lines
from megatron_prefix.plan.words import sized


def assumptions(plan: Plan) -> str:
    cost = plan.cost
    lines = [
        f"Prompts have {cost.prompt_tokens} tokens ({cost.prompt_tokens_from}); every rollout "
        "fills its prefix length.",
        f"Microbatches of each student replica a step: {cost.microbatches_a_replica}.",
        *_of_the_mode(plan),
        _how_counted(plan),
        *_offloaded(plan),
        *servers_lines(plan.teacher_servers, free_for_servers(plan.recipe)),
        *(_stand_in(Path(file)) for file in plan.shapes),
        *([_fit_line(plan.fit)] if plan.fit else []),
    ]
    if not cost.lengths_known:
        lines.append(_how_it_begins(plan))
    return "\n".join(lines)


def _how_it_begins(plan: Plan) -> str:
    prefix, cost = plan.recipe.prefix, plan.cost
    bound = ""
    if cost.longest_prefix == prefix.min_length:
        bound = ", the least it can cost"
    elif cost.shortest_prefix == prefix.max_length:
        bound = ", the most it can cost"
    return f"The policy {prefix.policy} moves with the data: counted is its start{bound}."


def _of_the_mode(plan: Plan) -> Iterator[str]:
    cost = plan.cost
    if cost.supervised_steps:
        yield f"No teacher scores {cost.supervised_steps} of the {cost.steps} steps."
    if cost.written_rollouts:
        total = cost.steps * cost.rollouts_a_step
        yield f"{cost.written_rollouts} of {total} rollouts are written before: nothing is sampled."
    if cost.domain_shares:
        shares = [f"{name or 'teacher'} {share:.0%}" for name, share in cost.domain_shares.items()]
        yield f"Rollouts by their teacher: {', '.join(shares)}."


def _offloaded(plan: Plan) -> Iterator[str]:
    fullest = max(plan.ranks, key=lambda rank: rank.in_host_memory)
    if fullest.in_host_memory:
        saved = max(rank.saved_by_offload for rank in plan.ranks)
        yield (
            f"Offloaded teachers: {sized(fullest.in_host_memory)} of host memory for rank "
            f"{fullest.rank}, and {sized(saved)} less on its device than with them resident."
        )


def _how_counted(plan: Plan) -> str:
    counted = "counted on the very modules" if plan.built else "by arithmetic"
    where = "as Transformer Engine runs" if on_gpus(plan.recipe) else "as without a GPU"
    return (
        f"Weights, gradients and optimizer are {counted}. The rows below them are estimates, "
        f"{where}, with every prompt and prefix at its longest."
    )


def _stand_in(shapes: Path) -> str:
    return f"{shapes.stem} is not here; its sizes are those of recipes/shapes/{shapes.name}."


def _fit_line(fit: Fit) -> str:
    taken = f" less {fit.reserve / GIB:.1f} reserved"
    if fit.server:
        taken += f" and {fit.server / GIB:.1f} of SGLang"
    word = "Fits" if fit.fits else "Does not fit"
    return (
        f"{word}: rank {fit.rank} needs {fit.needs / GIB:.1f} of {fit.free / GIB:.1f} GiB (a "
        f"card's {fit.card / GIB:.1f}{taken})."
    )
