"""Tables of a run for a console."""

from rich.table import Table

from megatron_prefix.report.figure import unit_of
from megatron_prefix.run_files.history import RunHistory, RunSummary
from megatron_prefix.run_files.progress import duration


def summary_table(summary: RunSummary, title: str = "") -> Table:
    """A run in a dozen lines, for a console."""
    table = Table(title=title or None, show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("steps", str(summary.steps))
    if summary.eval_prompts:
        table.add_row(f"accuracy before, {summary.eval_prompts} prompts", _percent(summary, False))
        table.add_row(f"accuracy after, {summary.eval_prompts} prompts", _percent(summary, True))
    table.add_row("prefix tokens sampled", f"{summary.tokens_sampled:,}")
    table.add_row("FLOPs", si(summary.flops))
    table.add_row("FLOPs of full-length distillation", si(summary.flops_full_opd))
    table.add_row("share of full length", f"{summary.flops_ratio:.2f}")
    table.add_row("time", duration(summary.seconds))
    return table


def phase_table(history: RunHistory) -> Table:
    """Where the steps' time went."""
    table = Table(title="Seconds by phase")
    table.add_column("phase", style="bold")
    for heading in ("sum", "mean a step", "share"):
        table.add_column(heading, justify="right")
    total = sum(float(values.sum()) for values in history.seconds.values()) or float("nan")
    for phase, values in sorted(history.seconds.items(), key=lambda item: -item[1].sum()):
        share = values.sum() / total
        table.add_row(phase, f"{values.sum():.1f}", f"{values.mean():.3f}", f"{share:.1%}")
    return table


def _percent(summary: RunSummary, after: bool) -> str:
    return f"{100 * (summary.accuracy_after if after else summary.accuracy_before):.1f}%"


def si(value: float) -> str:
    """``value`` with three digits and a unit prefix: 1.25e12 is ``1.25 T``."""
    factor, prefix = unit_of(value)
    return f"{value / factor:.3g} {prefix}"
