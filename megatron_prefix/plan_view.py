"""A plan as tables for people, or as JSON with every number exact."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prefix.plan import ModelPlan, Plan

RANKS_SHOWN = 16


def plan_json(plan: Plan) -> str:
    """Every field of the plan, with totals and ratios that are properties."""
    content: dict[str, Any] = asdict(plan)
    for rank, record in zip(plan.ranks, content["ranks"], strict=True):
        record["total"] = rank.total
    cost = content["cost"]
    cost["mean_step_flops"] = plan.cost.mean_step_flops
    cost["run"]["ratio"] = plan.cost.run.ratio
    cost["run"]["flops"]["total"] = plan.cost.run.flops.total
    cost["run"]["flops_full"]["total"] = plan.cost.run.flops_full.total
    return json.dumps(content, indent=2)


def print_plan(plan: Plan, console: Console) -> None:
    console.print(_models(plan))
    console.print(_ranks(plan))
    if plan.world_size > RANKS_SHOWN:
        console.print(f"and {plan.world_size - RANKS_SHOWN} more ranks: --json shows all")
    console.print(_costs(plan))
    console.print(_assumptions(plan))


def _models(plan: Plan) -> Table:
    table = _table(f"Models over {plan.world_size} ranks", ["", "student", "teacher"])
    both = (plan.student, plan.teacher)
    rows = {
        "folder": [model.hf_path for model in both],
        "architecture": [model.architecture for model in both],
        "parameters": [scaled(model.parameters) for model in both],
        "tensor x data x pipeline": [
            f"{m.tensor_model_parallel_size} x {m.data_parallel_size} x "
            f"{m.pipeline_model_parallel_size}"
            for m in both
        ],
        "layers by stage": [" + ".join(map(str, model.layers_by_stage)) for model in both],
        "vocabulary, padded": [f"{m.vocab_size:,}, {m.padded_vocab_size:,}" for m in both],
        "tensor-parallel groups": [_groups(model, "tp") for model in both],
        "data-parallel groups": [_groups(model, "dp") for model in both],
        "pipeline groups": [_groups(model, "pp") for model in both],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _groups(model: ModelPlan, kind: str) -> str:
    groups = model.groups[kind]
    shown = " ".join(f"[{_joined(group)}]" for group in groups[:4])
    # rich would read a group in brackets as markup.
    return (shown + (" ..." if len(groups) > 4 else "")).replace("[", r"\[")


def _joined(ranks: Sequence[int]) -> str:
    if len(ranks) <= 8:
        return ",".join(map(str, ranks))
    return f"{ranks[0]},{ranks[1]}..{ranks[-1]}"


def _ranks(plan: Plan) -> Table:
    unit, size = _unit(max(rank.total for rank in plan.ranks))
    columns = ["rank", "student", "teacher", "weights", "grads", "adam", "teacher", "head"]
    table = _table(f"{unit} a rank (student and teacher at tp,dp,pp)", [*columns, "sum"])
    for rank in plan.ranks[:RANKS_SHOWN]:
        held = (
            rank.student_weights,
            rank.student_gradients,
            rank.student_optimizer,
            rank.teacher_weights,
            rank.teacher_head,
            rank.total,
        )
        places = (_comma(rank.student_at), _comma(rank.teacher_at))
        table.add_row(str(rank.rank), *places, *(f"{held_bytes / size:.2f}" for held_bytes in held))
    return table


def _costs(plan: Plan) -> Table:
    cost, run = plan.cost, plan.cost.run
    table = _table(
        f"{plan.recipe.prefix.policy}: {cost.steps} steps of {cost.rollouts_a_step} rollouts",
        ["", "prefix", "full length", "share"],
    )
    pairs = {
        "prefix tokens a rollout": (
            f"{cost.mean_prefix:.1f} ({cost.shortest_prefix} to {cost.longest_prefix})",
            str(plan.recipe.prefix.max_length),
            run.prefix_tokens / run.full_tokens,
        ),
        "tokens of the run": (
            scaled(run.prefix_tokens),
            scaled(run.full_tokens),
            run.prefix_tokens / run.full_tokens,
        ),
        "FLOPs a step, mean": (
            scaled(run.flops.total / cost.steps),
            scaled(run.flops_full.total / cost.steps),
            run.ratio,
        ),
        "FLOPs of the run": (scaled(run.flops.total), scaled(run.flops_full.total), run.ratio),
    }
    for part in ("rollout", "teacher", "student"):
        spent, full = getattr(run.flops, part), getattr(run.flops_full, part)
        pairs[f"  of it {part}"] = (scaled(spent), scaled(full), spent / full)
    for name, (spent_cell, full_cell, share) in pairs.items():
        table.add_row(name, spent_cell, full_cell, f"{share:.3f}")
    return table


def _assumptions(plan: Plan) -> str:
    cost = plan.cost
    lines = [
        f"Prompts have {cost.prompt_tokens} tokens ({cost.prompt_tokens_from}); every rollout "
        "fills its prefix length.",
        f"Each student replica takes {cost.microbatches_a_replica} microbatches a step.",
        "Activations and communication buffers come on top of the bytes.",
    ]
    if not cost.lengths_known:
        lines.append(
            f"The policy {plan.recipe.prefix.policy} moves with the data: counted is its start, "
            "the least it can cost."
        )
    return "\n".join(lines)


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _comma(at: tuple[int, ...]) -> str:
    return ",".join(map(str, at)) or "-"


def scaled(value: float) -> str:
    """Three digits and a decimal prefix: 1.23 G."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:,.0f}"


def _unit(largest: int) -> tuple[str, int]:
    """The binary unit in which ``largest`` bytes have one to four digits."""
    for power, name in ((3, "GiB"), (2, "MiB")):
        if largest >= 1024**power:
            return name, 1024**power
    return "KiB", 1024
