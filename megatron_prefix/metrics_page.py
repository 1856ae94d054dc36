"""A run's state for Prometheus, at ``http://HOST:PORT/metrics`` of rank 0's machine.

The SGLang servers have pages of their own at ``/metrics``, on the addresses that they serve at.
"""

import os
from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from megatron_prefix.rollout.addresses import own_address
from megatron_prefix.types import StepMetrics

JOB = "job"  # as a host: this machine's address on the network that the ranks meet on
_PREFIX = "megatron_prefix_"
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
_SUMS = {
    "prefix_tokens": "prefix tokens that were sampled",
    "prompt_tokens": "tokens of their prompts",
    "skipped": "steps without an update",
}


class _State(Collector):
    """What is known now, in Prometheus' families. Written by one thread, read by another."""

    def __init__(self, run: str) -> None:
        self._run = run
        self.last: StepMetrics | None = None
        self.servers: int | None = None
        self.sums: Counter[str] = Counter()
        self.events: Counter[str] = Counter()

    def collect(self) -> Iterator[Metric]:
        if self.last is not None:
            for name, words in _LAST_STEP.items():
                yield self._gauge(name, words, float(getattr(self.last, name)))
            seconds = GaugeMetricFamily(
                f"{_PREFIX}phase_seconds", "of the last step", labels=("run", "phase")
            )
            for phase, value in self.last.seconds.items():
                seconds.add_metric((self._run, phase), value)
            yield seconds
        if self.servers is not None:
            yield self._gauge("servers", "SGLang servers that may be asked", self.servers)
        for name, words in _SUMS.items():
            total = CounterMetricFamily(f"{_PREFIX}{name}", words, labels=("run",))
            total.add_metric((self._run,), self.sums[name])
            yield total
        events = CounterMetricFamily(
            f"{_PREFIX}events", "lines of events.jsonl", labels=("run", "kind")
        )
        for kind, count in tuple(self.events.items()):
            events.add_metric((self._run, kind), count)
        yield events

    def _gauge(self, name: str, words: str, value: float) -> GaugeMetricFamily:
        gauge = GaugeMetricFamily(f"{_PREFIX}{name}", words, labels=("run",))
        gauge.add_metric((self._run,), value)
        return gauge


class MetricsPage:
    """Serves from a thread until closed. Raises ValueError where the port is taken."""

    def __init__(self, host: str, port: int, run: str) -> None:
        self._state = _State(run)
        registry = CollectorRegistry()
        registry.register(self._state)
        address = own_address(os.environ.get("MASTER_ADDR", "127.0.0.1")) if host == JOB else host
        try:
            self._server, self._thread = start_http_server(port, address, registry=registry)
        except OSError as error:
            raise ValueError(
                f"log.metrics_port={port} of {address} cannot be had ({error.strerror}); choose "
                "another, or 0 for no page"
            ) from error

    def step(self, metrics: StepMetrics) -> None:
        self._state.last = metrics
        self._state.sums.update({name: int(getattr(metrics, name)) for name in _SUMS})

    def servers(self, count: int) -> None:
        self._state.servers = count

    def event(self, kind: str) -> None:
        self._state.events[kind] += 1

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
