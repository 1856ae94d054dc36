"""A run's state for Prometheus, at ``http://HOST:PORT/metrics`` of rank 0's machine.

The SGLang servers have pages of their own at ``/metrics``, on the addresses that they serve at.
"""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_prefix.config import LogConfig
from megatron_prefix.health.slow_phases import StepTimes, Verdict
from megatron_prefix.rollout.addresses import own_address
from megatron_prefix.run_files.account import Account
from megatron_prefix.run_files.progress import Pace
from megatron_prefix.run_files.whole_file import whole_file
from megatron_prefix.types import StepMetrics

JOB = "job"  # as a host: this machine's address on the network that the ranks meet on
TARGETS = "metrics_targets.json"  # in the run's folder
PREFIX = "megatron_prefix_"
Labels = tuple[str, ...]
Values = Mapping[tuple[str, ...], float]  # by the labels' values
_LAST_STEP = {
    "step": "finished steps",
    "loss": "loss of the last step",
    "grad_norm": "gradient norm of the last step",
    "lr": "learning rate of the last step",
    "prefix_length": "longest prefix that was sampled, tokens",
    "cut_fraction": "share of rollouts that reached the prefix length",
    "policy_version": "version of the weights that sampled the last step",
    "policy_lag": "mean versions that rollouts were behind",
    "logprob_diff_max": "largest difference of a log-probability between server and trainer",
}
_PACE = {
    "total_steps": "steps that the run is to take",
    "eta_seconds": "time that the steps to come will take at the pace of the last ones",
    "tokens_per_second": "prefix tokens trained on, over all ranks, at that pace",
    "last_step_time_seconds": "when the last step was finished, Unix time",
}
_SUMS = {
    "prefix_tokens": "prefix tokens that were sampled",
    "prompt_tokens": "tokens of their prompts",
}


class _State(Collector):
    """What is known now, in Prometheus' families. Written by one thread, read by another."""

    def __init__(self, run: str, total_steps: int) -> None:
        self._run = run
        self._total_steps, self.pace = total_steps, Pace(total_steps)
        self.last: StepMetrics | None = None
        self.last_at = 0.0
        self.spent = Account()
        self.times: StepTimes | None = None
        self.servers: int | None = None
        self.accuracy: float | None = None
        self.skipped = 0
        self.slow: Counter[tuple[str, ...]] = Counter()  # by phase and rank
        self.events: Counter[tuple[str, ...]] = Counter()

    def collect(self) -> Iterator[Metric]:
        if self.last is not None:
            yield from self._of_the_last_step(self.last)
        if self.times is not None:
            yield from self._of_the_ranks(self.times)
        if self.servers is not None:
            yield self._gauge("servers", "SGLang servers that may be asked", self.servers)
        if self.accuracy is not None:
            words = "share of right answers in the last evaluation"
            yield self._gauge("evaluation_accuracy", words, self.accuracy)
        yield from self._sums()

    def _of_the_last_step(self, last: StepMetrics) -> Iterator[Metric]:
        for name, words in _LAST_STEP.items():
            yield self._gauge(name, words, float(getattr(last, name)))
        pace = (self._total_steps, self.pace.seconds_left, self.pace.tokens_per_second)
        for (name, words), value in zip(_PACE.items(), (*pace, self.last_at), strict=True):
            yield self._gauge(name, words, value)
        seconds: Values = {(phase,): value for phase, value in last.seconds.items()}
        yield self._gauges("phase_seconds", "of the last step", ("phase",), seconds)

    def _of_the_ranks(self, times: StepTimes) -> Iterator[Metric]:
        """Whichever rank holds the others up shows here."""
        work: Values = {(str(rank),): float(value) for rank, value in enumerate(times.work)}
        words = "what one fixed piece of work took on a rank, in the last step"
        yield self._gauges("rank_work_seconds", words, ("rank",), work)
        still: Values = {(str(rank),): float(value) for rank, value in enumerate(times.stood_still)}
        words = "time in the last step in which a rank's process was not let run"
        yield self._gauges("rank_stood_still_seconds", words, ("rank",), still)

    def _sums(self) -> Iterator[Metric]:
        """Over the run, those of before a resume included where its files tell them."""
        spent = self.spent
        for name, words in _SUMS.items():
            yield self._total(name, words, (), {(): float(getattr(spent, name))})
        flops: Values = {(part,): value for part, value in spent.by_part.items()}
        yield self._total("flops", "FLOPs of the run", ("part",), flops)
        full: Values = {(part,): value for part, value in vars(spent.flops_full).items()}
        words = "FLOPs that the same training steps would have taken at full length"
        yield self._total("flops_full", words, ("part",), full)
        if spent.flops_full.total:
            words = "training's FLOPs as a share of those at full length"
            yield self._gauge("flops_ratio", words, spent.ratio)
        yield self._total(
            "skipped", "steps without an update, since the start", (), {(): self.skipped}
        )
        words = (
            "verdicts that a phase, or a rank's work, was far slower than usual, since the start"
        )
        yield self._total("slow", words, ("phase", "rank"), {**self.slow})
        words = "lines of events.jsonl, since the start"
        yield self._total("events", words, ("kind",), {**self.events})

    def _gauge(self, name: str, words: str, value: float) -> Metric:
        return self._gauges(name, words, (), {(): value})

    def _gauges(self, name: str, words: str, labels: Labels, values: Values) -> Metric:
        return self._fill(GaugeMetricFamily(PREFIX + name, words, labels=("run", *labels)), values)

    def _total(self, name: str, words: str, labels: Labels, values: Values) -> Metric:
        family = CounterMetricFamily(PREFIX + name, words, labels=("run", *labels))
        return self._fill(family, values)

    def _fill(self, family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
        for labels, value in values.items():
            family.add_metric((self._run, *labels), value)
        return family


class MetricsPage:
    """Serves from a thread until closed. Raises ValueError where the port is taken."""

    def __init__(self, host: str, port: int, run: str, total_steps: int) -> None:
        self._state = _State(run, total_steps)
        registry = CollectorRegistry()
        registry.register(self._state)
        address = _address(host)
        try:
            self._server, self._thread = start_http_server(port, address, registry=registry)
        except OSError as error:
            raise ValueError(
                f"log.metrics_port={port} of {address} cannot be had ({error.strerror}); choose "
                "another, or 0 for no page"
            ) from error

    def step(self, metrics: StepMetrics, spent: Account) -> None:
        """``spent``: by the run so far, this step included."""
        state = self._state
        state.pace.add(metrics)
        state.last, state.last_at, state.spent = metrics, time.time(), spent
        state.skipped += metrics.skipped

    def times(self, times: StepTimes, verdict: Verdict) -> None:
        self._state.times = times
        if verdict.words:
            rank = str(verdict.rank) if verdict.rank >= 0 else ""
            self._state.slow[verdict.phase, rank] += 1

    def evaluation(self, accuracy: float) -> None:
        self._state.accuracy = accuracy

    def servers(self, count: int) -> None:
        self._state.servers = count

    def event(self, kind: str) -> None:
        self._state.events[(kind,)] += 1

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextlib.contextmanager
def announced(folder: Path, log: LogConfig, servers: Sequence[str]) -> Iterator[None]:
    """Within the block, ``folder`` holds a file for Prometheus' ``file_sd_configs`` that names the
    run's page and those of the servers at the URLs ``servers``."""
    labels = {"run": folder.name}
    trainer = {"targets": [f"{_address(log.metrics_host)}:{log.metrics_port}"]}
    sglang = {"targets": [urlsplit(url).netloc for url in servers]}
    groups = [trainer | {"labels": {"job": "megatron_prefix", **labels}}]
    groups += [sglang | {"labels": {"job": "sglang", **labels}}] if servers else []
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / TARGETS) as file:
        file.write_text(json.dumps(groups, indent=1) + "\n", encoding="utf-8")
    try:
        yield
    finally:
        (folder / TARGETS).unlink(missing_ok=True)


def _address(host: str) -> str:
    return own_address(os.environ.get("MASTER_ADDR", "127.0.0.1")) if host == JOB else host
