"""What a person sees of a running job: a bar on a terminal, plain lines anywhere else."""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from megatron_prefix.run_files.kl_grid import mean_kl
from megatron_prefix.types import StepMetrics

SMOOTHING = 0.2  # weight of the newest step in the moving means of time and tokens
REDRAW_S = 0.1  # least time between two drawings of the bar


class Pace:
    """Moving means of a step's time and tokens: tokens/s and the time that is left."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._seconds = 0.0
        self._tokens = 0.0
        self._left = 0

    def add(self, metrics: StepMetrics) -> None:
        seconds = sum(metrics.seconds.values())
        weight = SMOOTHING if self._seconds else 1.0
        self._seconds += weight * (seconds - self._seconds)
        self._tokens += weight * (metrics.prefix_tokens - self._tokens)
        self._left = max(self._total_steps - metrics.step, 0)

    @property
    def tokens_per_second(self) -> float:
        """Prefix tokens trained on, over all ranks; 0 before the first timed step."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def seconds_left(self) -> float:
        return self._left * self._seconds


class ProgressView(Protocol):
    def show(self, metrics: StepMetrics, spent: str = "") -> None: ...

    def note(self, text: str) -> None:
        """Something to say besides, until the next note."""

    def close(self) -> None: ...


def progress_view(
    console: Console, total_steps: int, log_interval: int, resume_step: int
) -> ProgressView:
    if console.is_terminal:
        return Bar(console, total_steps, resume_step)
    return PlainLines(console, total_steps, log_interval)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class PlainLines:
    """One line every ``log_interval`` steps, and one for the last step and each skipped one."""

    def __init__(self, console: Console, total_steps: int, log_interval: int) -> None:
        self._console = console
        self._total_steps = total_steps
        self._log_interval = max(log_interval, 1)
        self._pace, self._note = Pace(total_steps), ""

    def note(self, text: str) -> None:
        self._note = text

    def show(self, metrics: StepMetrics, spent: str = "") -> None:
        self._pace.add(metrics)
        due = metrics.step % self._log_interval == 0 or metrics.step == self._total_steps
        if due or metrics.skipped:
            what = describe(metrics, self._pace, spent, self._note)
            line = f"step {metrics.step}/{self._total_steps} {what}"
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing is held."""


class Bar:
    """A rich progress bar, drawn by the trainer's own thread.

    A drawing thread could hold the console's lock while a checkpoint writer is forked, and the
    child would wait for that lock for ever.
    """

    def __init__(self, console: Console, total_steps: int, resume_step: int) -> None:
        self._pace, self._note = Pace(total_steps), ""
        self._drawn = 0.0
        columns = (
            TextColumn("step"),
            # A narrow terminal takes from the bar, not from the count.
            MofNCompleteColumn(table_column=Column(min_width=2 * len(str(total_steps)) + 1)),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}"),
        )
        self._progress = Progress(*columns, console=console, auto_refresh=False)
        self._task = self._progress.add_task(
            "train", total=total_steps, completed=resume_step, status="waiting for the first step"
        )
        self._progress.start()

    def note(self, text: str) -> None:
        self._note = text

    def show(self, metrics: StepMetrics, spent: str = "") -> None:
        self._pace.add(metrics)
        status = describe(metrics, self._pace, spent, self._note)
        self._progress.update(self._task, completed=metrics.step, status=status)
        if time.monotonic() - self._drawn > REDRAW_S:
            self._progress.refresh()
            self._drawn = time.monotonic()

    def close(self) -> None:
        self._progress.stop()


def describe(metrics: StepMetrics, pace: Pace, *notes: str) -> str:
    """Loss, prefix length, notes, tokens/s and the time left, for the bar and a plain line; the KL
    too where it reads otherwise than the loss."""
    loss = f"{metrics.loss:.4f}"
    kl = f"{mean_kl(metrics.kl_by_position, metrics.tokens_by_position):.4f}"
    said = "".join(f"{note} " for note in notes if note)
    return (
        f"loss {loss} {'' if kl == loss else f'kl {kl} '}L {metrics.prefix_length} {said}"
        f"tok/s {pace.tokens_per_second:.0f} eta {duration(pace.seconds_left)}"
        + (" SKIPPED: not finite" if metrics.skipped else "")
    )
