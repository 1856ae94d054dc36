"""Rows of the prefix benchmark: their table of medians, and the goals that they meet or miss."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One run. Rates are from 0 to 1; ``flops`` are training's."""

    policy: str
    student: str
    seed: int
    lr: float
    accuracy: float
    plan: float
    execution: float | None  # over valid plans; None: no plan was valid
    flops: float
    tokens: int  # prefix tokens


@dataclass(frozen=True)
class Goal:
    """A margin that student A is to keep at lr 1e-3, against full's medians of the same rows."""

    policy: str
    below_full: float  # points of accuracy that may be lost
    flops: float  # of full's, at most


MARGINS = (
    Goal("anchored", 3, 0.40),
    Goal("adaptive", 3, 0.60),
    Goal("linear", 4, 0.75),
)
MET, MISSED, UNKNOWN = "met", "MISSED", "not measured"
Verdict = tuple[str, str, str]  # goal, what was measured, whether it was met


def group(rows: Iterable[Row]) -> dict[tuple[str, float, str], list[Row]]:
    """By student, learning rate and policy, in the order in which they come."""
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.student, row.lr, row.policy), []).append(row)
    return groups


def median_accuracy(rows: Sequence[Row]) -> float:
    """In percent."""
    return 100 * statistics.median(row.accuracy for row in rows)


def median_flops(rows: Sequence[Row]) -> float:
    return statistics.median(row.flops for row in rows)


def summary_table(rows: Iterable[Row], steps: int) -> Table:
    """One line a policy, student and learning rate: medians over seeds, each seed's accuracy."""
    groups = group(rows)
    table = Table(title=f"SORT-CHAIN, {steps} steps of 32, 500 held-out prompts, medians")
    for name in ("student", "lr", "policy", "accuracy %", "by seed", "plan %", "execution %"):
        table.add_column(name, justify="left" if name in ("student", "policy") else "right")
    for name in ("GFLOP", "of full's", "k tokens"):
        table.add_column(name, justify="right")
    for (student, lr, policy), found in groups.items():
        flops, full = median_flops(found), groups.get((student, lr, "full"))
        table.add_row(
            student,
            f"{lr:g}",
            policy,
            f"{median_accuracy(found):.1f}",
            "/".join(f"{100 * row.accuracy:.1f}" for row in found),
            percent([row.plan for row in found]),
            percent([row.execution for row in found if row.execution is not None]),
            f"{flops / 1e9:.0f}",
            f"{flops / median_flops(full):.2f}" if full else "-",
            f"{statistics.median(row.tokens for row in found) / 1e3:.0f}",
        )
    return table


def percent(values: Sequence[float]) -> str:
    return f"{100 * statistics.median(values):.1f}" if values else "-"


def goals_table(rows: Iterable[Row]) -> Table:
    """Every goal with what these rows say of it, the missed ones as plainly as the others."""
    table = Table(title="Goals")
    table.add_column("goal")
    table.add_column("measured")
    table.add_column("", justify="right")
    for goal, measured, verdict in verdicts(rows):
        table.add_row(goal, measured, verdict, style="bold" if verdict == MISSED else "")
    return table


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    groups = group(rows)
    at_lr = {key[2]: found for key, found in groups.items() if key[:2] == ("A", 1e-3)}
    told = [_full(at_lr)]
    told += [_margin(goal, at_lr) for goal in MARGINS]
    told += [_late(at_lr), _fixed(at_lr)]
    told += _one_policy(groups)
    return told


def _full(at_lr: dict[str, list[Row]]) -> Verdict:
    goal = "A: full reaches 80%"
    if "full" not in at_lr:
        return goal, "", UNKNOWN
    reached = median_accuracy(at_lr["full"])
    return goal, f"{reached:.1f}%", _verdict(reached >= 80)


def _margin(goal: Goal, at_lr: dict[str, list[Row]]) -> Verdict:
    words = f"A: {goal.policy} within {goal.below_full:g} points of full at {goal.flops:.2f}x"
    if goal.policy not in at_lr or "full" not in at_lr:
        return words, "", UNKNOWN
    lost, ratio = _against(at_lr[goal.policy], at_lr["full"])
    met = lost <= goal.below_full and ratio <= goal.flops
    return words, f"{-lost:+.1f} points, {ratio:.2f}x", _verdict(met)


def _late(at_lr: dict[str, list[Row]]) -> Verdict:
    goal = "A: late reaches 85% at 0.45x"
    if "late" not in at_lr or "full" not in at_lr:
        return goal, "", UNKNOWN
    reached = median_accuracy(at_lr["late"])
    _, ratio = _against(at_lr["late"], at_lr["full"])
    return goal, f"{reached:.1f}%, {ratio:.2f}x", _verdict(reached >= 85 and ratio <= 0.45)


def _fixed(at_lr: dict[str, list[Row]]) -> Verdict:
    goal = "A: fixed at 9 has plan 88% or more and accuracy 20% or less"
    if "fixed" not in at_lr:
        return goal, "", UNKNOWN
    plan = 100 * statistics.median(row.plan for row in at_lr["fixed"])
    accuracy = median_accuracy(at_lr["fixed"])
    measured = f"plan {plan:.1f}%, accuracy {accuracy:.1f}%"
    return goal, measured, _verdict(plan >= 88 and accuracy <= 20)


def _one_policy(groups: dict[tuple[str, float, str], list[Row]]) -> Iterator[Verdict]:
    """Each counts with the best of its learning rates. On student B more than full's FLOPs prove
    nothing, and a loss on fewer leaves open what the rest would have brought."""
    best_full = {student: _best(groups, student, "full") for student in ("A", "B")}
    for policy in dict.fromkeys(key[2] for key in groups if key[2] != "full"):
        a, b = (_best(groups, student, policy) for student in ("A", "B"))
        full_a, full_b = best_full["A"], best_full["B"]
        if a and full_a:
            lost, ratio = _against(a, full_a)
            if ratio > 0.30:
                continue
            goal = f"A: {policy} within 1 point of full at 0.30x, each at its best lr"
            yield goal, f"{-lost:+.1f} points, {ratio:.2f}x", _verdict(lost <= 1)
        if b and full_b:
            lost, ratio = _against(b, full_b)
            goal = f"B: {policy} within 3 points of full for no more FLOPs"
            open_yet = ratio > 1.1 or (lost > 3 and ratio < 0.9)
            measured = f"{-lost:+.1f} points, {ratio:.2f}x"
            yield goal, measured, UNKNOWN if open_yet else _verdict(lost <= 3)


def _best(
    groups: dict[tuple[str, float, str], list[Row]], student: str, policy: str
) -> list[Row] | None:
    found = [rows for key, rows in groups.items() if (key[0], key[2]) == (student, policy)]
    return max(found, key=median_accuracy) if found else None


def _against(rows: Sequence[Row], full: Sequence[Row]) -> tuple[float, float]:
    """Points of accuracy lost against full, and the share of its FLOPs."""
    lost = median_accuracy(full) - median_accuracy(rows)
    return lost, median_flops(rows) / median_flops(full)


def _verdict(met: bool) -> str:
    return MET if met else MISSED
