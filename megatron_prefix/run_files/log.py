"""Everything a run reports, on rank 0: JSON lines, TensorBoard, progress; and Python's logging."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from rich import get_console
from rich.console import Console
from rich.logging import RichHandler

from megatron_prefix.config import LogConfig
from megatron_prefix.health.metrics_page import MetricsPage
from megatron_prefix.health.slow_phases import StepTimes, Verdict
from megatron_prefix.report.figure import unit_of
from megatron_prefix.run_files import account, jsonl
from megatron_prefix.run_files.account import Account
from megatron_prefix.run_files.progress import progress_view
from megatron_prefix.run_files.tb_writer import TensorBoardWriter
from megatron_prefix.types import Flops, ProbeMetrics, StepMetrics

logger = logging.getLogger(__name__)

PACKAGE = "megatron_prefix"
LEDGER_INTERVAL_S = 10.0  # most seconds that the ledger's file lies behind a run of short steps
RANK_FORMAT = "%(asctime)s rank %(rank)d %(levelname)s %(name)s: %(message)s"


class Evaluation(Protocol):
    """What :meth:`RunLog.evaluation` reads of a result."""

    @property
    def accuracy(self) -> float: ...  # 0 to 1

    @property
    def n(self) -> int: ...  # answers scored

    @property
    def truncated(self) -> int: ...  # answers that met eval.max_new_tokens

    @property
    def unparsable(self) -> int: ...  # answers that could not be read, counted as wrong

    @property
    def tokens(self) -> int: ...  # sampled

    @property
    def seconds(self) -> float: ...


class RunLog:
    """Writes a run's folder; one process (rank 0) holds it.

    Opening it on a folder that was written before moves every record of a step after
    ``resume_step`` into ``*.discarded.jsonl``, so no step is counted twice.
    """

    def __init__(
        self,
        folder: Path,
        log: LogConfig,
        total_steps: int,
        *,
        console: Console | None = None,
        resume_step: int = 0,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._log = folder, log
        self._last_step = resume_step
        for name in (jsonl.METRICS, jsonl.EVALUATIONS, jsonl.SAMPLES, jsonl.PROBES):
            moved = jsonl.keep_until(folder / name, resume_step)
            if moved:
                logger.info("resuming after step %d: moved %d of %s", resume_step, moved, name)
        self._account, self._account_written = account.read_account(folder), 0.0
        self._metrics = jsonl.JsonLines(folder / jsonl.METRICS)
        self._evaluations = jsonl.JsonLines(folder / jsonl.EVALUATIONS)
        self._samples = jsonl.JsonLines(folder / jsonl.SAMPLES)
        self._events = jsonl.JsonLines(folder / jsonl.EVENTS)
        self._probes = jsonl.JsonLines(folder / jsonl.PROBES) if log.probe_interval else None
        self._tensorboard = (
            TensorBoardWriter(folder / "tensorboard", log, resume_step) if log.tensorboard else None
        )
        self._view = progress_view(
            console or get_console(), total_steps, log.log_interval, resume_step
        )
        self._page = (
            MetricsPage(log.metrics_host, log.metrics_port, folder.name, total_steps)
            if log.metrics_port
            else None
        )
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def account(self) -> Account:
        """Sums over the run from its first step on, the steps before a resume included."""
        return self._account

    def _enter(self, spent: Account, *, now: bool = False) -> None:
        """Adds to the account, and renews its file now and then."""
        self._account += spent
        if now or time.monotonic() - self._account_written > LEDGER_INTERVAL_S:
            account.write_account(self._account, self._folder)
            self._account_written = time.monotonic()

    def step(self, metrics: StepMetrics) -> None:
        """One finished step, ``metrics.step`` counting from 1."""
        record = jsonl.metrics_record(metrics)
        self._metrics.write(record)
        self._enter(account.of_step(record))
        self._last_step = metrics.step
        if self._tensorboard:
            self._tensorboard.step(metrics, self._account)
        if self._page:
            self._page.step(metrics, self._account)
        self._view.show(metrics, spent_words(self._account))

    def times(self, times: StepTimes, verdict: Verdict) -> None:
        """A step's times on all ranks, and what was slow about them."""
        if self._page:
            self._page.times(times, verdict)
        if verdict.words:
            phase, rank = verdict.phase, verdict.rank
            self.event("slow", verdict.words, level=logging.WARNING, phase=phase, rank=rank)

    def servers(self, count: int) -> None:
        """SGLang servers that may be asked now."""
        if self._page:
            self._page.servers(count)

    def wants_rollouts(self, step: int) -> bool:
        """Whether :meth:`rollouts` is due, so that texts are decoded only then."""
        interval = self._log.sample_rollouts_interval
        return bool(interval) and self._log.sample_rollouts > 0 and step % interval == 0

    def rollouts(
        self,
        step: int,
        prompt_texts: Sequence[str],
        prefix_texts: Sequence[str],
        details: Sequence[Mapping[str, str | int | float]],
    ) -> None:
        """The first ``log.sample_rollouts`` of a step's rollouts as text.

        ``details`` holds a few named values a rollout: its finish reason, length, version.
        """
        shown = slice(self._log.sample_rollouts)
        texts = list(zip(prompt_texts, prefix_texts, details, strict=True))[shown]
        for prompt, prefix, detail in texts:
            record = {"step": step, "prompt": prompt, "prefix": prefix, "details": dict(detail)}
            self._samples.write(record)
        if self._tensorboard:
            self._tensorboard.rollouts(
                step, prompt_texts[shown], prefix_texts[shown], details[shown]
            )

    def evaluation(self, step: int, result: Evaluation, flops: Flops) -> None:
        """Accuracy on the held-out set with the weights after ``step`` (0: before training), and
        what the answers cost."""
        record = {
            "step": step,
            "accuracy": jsonl.number(result.accuracy),
            "n": result.n,
            "truncated": result.truncated,
            "unparsable": result.unparsable,
            "tokens": result.tokens,
            "seconds": jsonl.number(result.seconds),
            "flops": jsonl.number(flops.total),
        }
        self._evaluations.write(record)
        self._enter(account.of_evaluation(record), now=True)
        if self._tensorboard:
            self._tensorboard.evaluation(step, result.accuracy)
        if self._page:
            self._page.evaluation(result.accuracy)
        logger.info(
            "evaluation after step %d: accuracy %.1f%% of %d, %d truncated, %d unparsable, %.1f s",
            step, 100 * result.accuracy, result.n, result.truncated, result.unparsable,
            result.seconds,
        )  # fmt: skip

    def evaluated(self) -> set[int]:
        """The steps whose evaluation is in ``evaluations.jsonl``."""
        return {each["step"] for each in jsonl.read_records(self._folder / jsonl.EVALUATIONS)}

    def probe(self, metrics: ProbeMetrics) -> None:
        """Full-length rollouts, scored and not trained on, with the weights after a step."""
        assert self._probes is not None, "log.probe_interval=0"
        record = jsonl.metrics_record(metrics)
        self._probes.write(record)
        self._enter(account.of_probe(record), now=True)
        tail, agreement = metrics.kl_tail, metrics.agreement
        self._view.note(f"tail {_shown(tail, '.4f')} agree {_shown(agreement, '.2f')}")
        if self._tensorboard:
            self._tensorboard.probe(metrics)
        logger.info(
            "probe after step %d: KL %s within the prefix of %d tokens, beyond it %s, "
            "gradients agree by %s",
            metrics.step, _shown(metrics.kl_prefix, ".4f"), metrics.prefix_length,
            _shown(tail, ".4f"), _shown(agreement, ".3f"),
        )  # fmt: skip

    def probes(self) -> list[dict[str, Any]]:
        """The records of the run's probes so far, those before a resume included."""
        return list(jsonl.read_records(self._folder / jsonl.PROBES))

    def event(
        self,
        kind: str,
        message: str,
        *,
        level: int = logging.INFO,
        **fields: str | int | float | bool,
    ) -> None:
        """Something that is no step: a save, a signal, a skipped step, a lost server."""
        record = {"time": time.time(), "step": self._last_step, "kind": kind, "message": message}
        self._events.write(record | _finite(fields))
        if self._tensorboard:
            self._tensorboard.event(self._last_step, kind, message)
        if self._page:
            self._page.event(kind)
        logger.log(level, "%s: %s", kind, message)

    def close(self) -> None:
        """Ends the bar and closes every file; once closed, closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        self._enter(Account(), now=True)
        self._view.close()
        files = (self._metrics, self._evaluations, self._samples, self._events, self._probes)
        for file in files:
            if file is not None:
                file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._page:
            self._page.close()


def setup_logging(folder: Path, rank: int, console: Console | None = None) -> None:
    """Sends logging to ``folder/logs/rank_<rank>.log`` and, on rank 0, to the console.

    Every record names its rank. The file holds this package's records from DEBUG on, the console
    from INFO on; of other packages both hold warnings and errors, and the file holds what goes
    through ``warnings``. The console is rich's own unless one is given, as in :class:`RunLog`:
    records land above the progress bar where both have the same. Called again, it replaces the
    handlers of its last call.
    """
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    formatter = logging.Formatter(RANK_FORMAT, defaults={"rank": rank})
    to_file = logging.FileHandler(logs / f"rank_{rank}.log", encoding="utf-8")
    to_file.setFormatter(formatter)
    handlers: list[logging.Handler] = [to_file]
    if rank == 0:
        handlers.append(_console_handler(console or get_console(), formatter))
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if handler.name == PACKAGE]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.name = PACKAGE
        root.addHandler(handler)
    logging.getLogger(PACKAGE).setLevel(logging.DEBUG)
    logging.captureWarnings(True)


def _console_handler(console: Console, formatter: logging.Formatter) -> logging.Handler:
    """Above the progress bar on a terminal; unwrapped lines where there is none."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, markup=False)
        formatter = logging.Formatter("rank 0 %(message)s")
    else:
        handler = logging.StreamHandler(console.file)
    handler.setFormatter(formatter)
    handler.setLevel(logging.INFO)
    handler.addFilter(_concerns_the_user)
    return handler


def _concerns_the_user(record: logging.LogRecord) -> bool:
    """Libraries' warnings at import are for the file: they would bury what a run has to say."""
    return record.name.startswith(PACKAGE) or record.levelno >= logging.ERROR


def _finite(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: jsonl.number(value) if isinstance(value, float) else value
        for name, value in fields.items()
    }


def _shown(value: float, form: str) -> str:
    """A mean over no token is NaN, and so is a cosine that nobody asked for."""
    return "-" if math.isnan(value) else format(value, form)


def spent_words(spent: Account) -> str:
    """Training's FLOPs so far, and those as a share of full length."""
    factor, prefix = unit_of(spent.flops.total)
    return f"{spent.flops.total / factor:.3g} {prefix}FLOP {spent.ratio:.2f}x"
