"""A plan as tables for people, or as JSON with every number exact."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prefix.plan.fit import GIB, Fit, free_for_servers
from megatron_prefix.plan.make import ModelPlan, Plan
from megatron_prefix.plan.memory import RankPlan, on_gpus
from megatron_prefix.plan.servers import servers_lines
from megatron_prefix.plan.teachers import stage_at

KINDS_SHOWN = 6


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
    console.print(_ranks(plan))
    console.print(_costs(plan))
    console.print(_assumptions(plan))


def _models(plan: Plan) -> Table:
    names = ["", "student", "teacher", *(f"teachers.{name}" for name in plan.more_teachers)]
    table = _table(f"Models over {plan.world_size} ranks", names)
    both = (plan.student, plan.teacher, *plan.more_teachers.values())
    rows = {
        "folder": [model.hf_path for model in both],
        "architecture": [model.architecture for model in both],
        "parameters": ["-" if _served(m) else scaled(m.parameters) for m in both],
        "tensor x data x pipeline": [
            "behind SGLang servers"
            if _served(m)
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


def _ranks(plan: Plan) -> Table:
    """One column a kind of rank; rows of nothing are left out."""
    unit, size = _unit(max(rank.total for rank in plan.ranks))
    kinds = [_kind(plan, ranks) for ranks in _shown(rank_kinds(plan.ranks))]
    title = f"{unit} a rank, by its stage of student / teacher"
    table = _table(title, ["", *(f"{kind.name}\n{kind.ranks}" for kind in kinds)])
    for name in kinds[0].bytes:
        held = [kind.bytes[name] for kind in kinds]
        if any(held) or name == "sum":
            table.add_row(name, *(f"{each / size:.2f}" for each in held))
    return table


def _shown(kinds: list[list[RankPlan]]) -> list[list[RankPlan]]:
    """The first, the last and the fullest of many."""
    if len(kinds) <= KINDS_SHOWN:
        return kinds
    by_need = sorted(kinds[1:-1], key=lambda ranks: -ranks[0].total)
    chosen = [kinds[0], kinds[-1], *by_need[: KINDS_SHOWN - 2]]
    return sorted(chosen, key=lambda ranks: ranks[0].rank)


def rank_kinds(ranks: Sequence[RankPlan]) -> list[list[RankPlan]]:
    """Ranks of the same stages, which hold the same."""
    kinds: dict[tuple[object, ...], list[RankPlan]] = {}
    for rank in ranks:
        parts = tuple((part.domain, stage_at(part.at)) for part in rank.teachers)
        kinds.setdefault((stage_at(rank.student_at), parts), []).append(rank)
    return list(kinds.values())


@dataclass(frozen=True)
class _Kind:
    """A column of the table of ranks."""

    name: str
    ranks: str
    bytes: dict[str, int]


def _kind(plan: Plan, ranks: Sequence[RankPlan]) -> _Kind:
    one = max(ranks, key=lambda rank: rank.total)
    student = _stage(stage_at(one.student_at), plan.student.pipeline_model_parallel_size)
    names = [_teacher_stage(plan, one, domain) for domain in ("", *plan.more_teachers)]
    worst = one.worst
    return _Kind(
        name=student if {*names} == {student} else " / ".join([student, *names]),
        ranks=_spans([rank.rank for rank in ranks]),
        bytes={
            "student's weights": one.student_weights,
            "gradients": one.student_gradients,
            "optimizer": one.student_optimizer,
            "teacher's weights": one.resident + worst.weights,
            "teacher's LM head": one.teacher_head,
            "FP8 copies": one.fp8_weights,
            f"teacher's {_sent(plan)}": one.teacher_hidden,
            "activations": worst.activations,
            "KL workspace": worst.workspace,
            "sum": one.total,
        },
    )


def _teacher_stage(plan: Plan, rank: RankPlan, domain: str) -> str:
    part = next((part for part in rank.teachers if part.domain == domain), None)
    model = plan.more_teachers[domain] if domain else plan.teacher
    return _stage(stage_at(part.at) if part else -1, model.pipeline_model_parallel_size)


def _served(model: ModelPlan) -> bool:
    """Whether it is on none of the ranks."""
    return not model.data_parallel_size


def _sent(plan: Plan) -> str:
    """What teachers tell the student's last stage."""
    kinds = {_served(model) for model in (plan.teacher, *plan.more_teachers.values())}
    if len(kinds) > 1:
        return "targets"
    return "top-k tokens" if kinds == {True} else "hidden states"


def _stage(number: int, stages: int) -> str:
    if number < 0:
        return "-"
    if stages == 1:
        return "all"
    return {0: "first", stages - 1: "last"}.get(number, f"stage {number}")


def _spans(ranks: Sequence[int]) -> str:
    """ranks 0-7,16-23 for ranks in order."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = [f"{first}-{last}" if last > first else str(first) for first, last in spans]
    told = ",".join(shown[:4]) + (",..." if len(shown) > 4 else "")
    return f"ranks {told}" if len(ranks) > 1 else f"rank {told}"


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
    if cost.probes:
        table.add_row(f"FLOPs of {cost.probes} probes", scaled(cost.probe_flops), "", "")
    if cost.evaluations:
        name = f"FLOPs of {cost.evaluations} evaluations, at most"
        known = scaled(cost.evaluation_flops) if cost.answers else "not known"
        table.add_row(name, known, "", "")
    return table


def _assumptions(plan: Plan) -> str:
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
        lines.append(
            f"The policy {plan.recipe.prefix.policy} moves with the data: counted is its start, "
            "the least it can cost."
        )
    return "\n".join(lines)


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
            f"Offloaded teachers: {_sized(fullest.in_host_memory)} of host memory for rank "
            f"{fullest.rank}, and {_sized(saved)} less on its device than with them resident."
        )


def _sized(size: int) -> str:
    unit, one = _unit(size)
    return f"{size / one:.2f} {unit}"


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


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    return table


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
