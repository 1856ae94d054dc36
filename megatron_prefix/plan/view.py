"""A plan as tables for people, or as JSON with every number exact."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prefix.plan.assumptions import assumptions
from megatron_prefix.plan.make import ModelPlan, Plan
from megatron_prefix.plan.rank_columns import ranks_table
from megatron_prefix.plan.words import scaled, table_of


def plan_json(plan: Plan) -> str:
    """Every field of the plan, with totals and ratios that are properties."""
    content: dict[str, Any] = asdict(plan)
    for rank, record in zip(plan.ranks, content["ranks"], strict=True):
        record["held"], record["working"], record["total"] = rank.held, rank.working, rank.total
        record["saved_by_offload"] = rank.saved_by_offload
    if plan.fit:
        content["fit"] |= {"fits": plan.fit.fits, "free": plan.fit.free}
    cost = content["cost"]
    cost["mean_step_flops"] = plan.cost.mean_step_flops
    cost["run"]["ratio"] = plan.cost.run.ratio
    cost["run"]["flops"]["total"] = plan.cost.run.flops.total
    cost["run"]["flops_full"]["total"] = plan.cost.run.flops_full.total
    return json.dumps(content, indent=2)


def print_plan(plan: Plan, console: Console) -> None:
    console.print(_models(plan))
    console.print(ranks_table(plan))
    console.print(_costs(plan))
    console.print(assumptions(plan))


def _models(plan: Plan) -> Table:
    names = ["", "student", "teacher", *(f"teachers.{name}" for name in plan.more_teachers)]
    table = table_of(f"Models over {plan.world_size} ranks", names)
    both = (plan.student, plan.teacher, *plan.more_teachers.values())
    rows = {
        "folder": [model.hf_path for model in both],
        "architecture": [model.architecture for model in both],
        "parameters": ["-" if m.served else scaled(m.parameters) for m in both],
        "tensor x data x pipeline": [
            "behind SGLang servers"
            if m.served
            else f"{m.tensor_model_parallel_size} x {m.data_parallel_size} x "
            f"{m.pipeline_model_parallel_size}"
            for m in both
        ],
        "layers by stage": [" + ".join(map(str, model.layers_by_stage)) for model in both],
        "vocabulary": [f"{m.vocab_size:,}" for m in both],
        "  padded to": [f"{m.padded_vocab_size:,}" for m in both],
        "tensor-parallel groups": [_groups(model, "tp") for model in both],
        "data-parallel groups": [_groups(model, "dp") for model in both],
        "pipeline groups": [_groups(model, "pp") for model in both],
    }
    if any(model.context_parallel_size > 1 for model in both):
        rows["context-parallel groups"] = [_groups(model, "cp") for model in both]
    if any(model.expert_tensor_parallel_size for model in both):
        rows["expert x expert-tensor"] = [_experts(model) for model in both]
    if plan.student.fp8_bytes_saved:
        saved = f"{plan.student.fp8_bytes_saved:,} bytes a token and rank"
        rows["activations saved by FP8"] = [saved, *["keeps none"] * (len(both) - 1)]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _experts(model: ModelPlan) -> str:
    if not model.expert_tensor_parallel_size:
        return "none"
    return f"{model.expert_model_parallel_size} x {model.expert_tensor_parallel_size}"


def _groups(model: ModelPlan, kind: str) -> str:
    groups = model.groups[kind]
    shown = " ".join(f"[{_joined(group)}]" for group in groups[:4])
    # rich would read a group in brackets as markup.
    return (shown + (" ..." if len(groups) > 4 else "")).replace("[", r"\[")


def _joined(ranks: Sequence[int]) -> str:
    """0-7 or 0,4..28: ranks of a group are equally far apart."""
    if len(ranks) < 4:
        return ",".join(map(str, ranks))
    first, second, last = ranks[0], ranks[1], ranks[-1]
    return f"{first}-{last}" if second == first + 1 else f"{first},{second}..{last}"


def _costs(plan: Plan) -> Table:
    cost, run = plan.cost, plan.cost.run
    table = table_of(
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
    if cost.probes:
        table.add_row(f"FLOPs of {cost.probes} probes", scaled(cost.probe_flops), "", "")
    if cost.evaluations:
        name = f"FLOPs of {cost.evaluations} evaluations, at most"
        known = scaled(cost.evaluation_flops) if cost.answers else "not known"
        table.add_row(name, known, "", "")
    return table
