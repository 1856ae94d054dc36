"""The table of a plan's ranks: a column a kind of rank, a row a kind of bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from megatron_prefix.plan.make import Plan
from megatron_prefix.plan.memory import RankPlan
from megatron_prefix.plan.teachers import stage_at
from megatron_prefix.plan.words import table_of, unit_of

KINDS_SHOWN = 6


def ranks_table(plan: Plan) -> Table:
    """Bytes by kind of rank, a column each; a row that is 0 for all of them is left out."""
    unit, size = unit_of(max(rank.total for rank in plan.ranks))
    kinds = [_kind(plan, ranks) for ranks in _shown(rank_kinds(plan.ranks))]
    title = f"{unit} a rank, by its stage of student / teacher"
    table = table_of(title, ["", *(f"{kind.name}\n{kind.ranks}" for kind in kinds)])
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


def _sent(plan: Plan) -> str:
    """What teachers tell the student's last stage."""
    kinds = {model.served for model in (plan.teacher, *plan.more_teachers.values())}
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
