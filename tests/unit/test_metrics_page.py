"""What Prometheus would read of a run, over HTTP."""

import socket
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_prefix.config import LogConfig
from megatron_prefix.metrics_page import MetricsPage
from megatron_prefix.run_log import RunLog
from tests.unit.test_run_log import metrics


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read(port: int) -> dict[tuple[str, str], float]:
    """By sample name and its label besides the run's."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {"named"}
    return {
        (sample.name, next((v for k, v in sample.labels.items() if k != "run"), "")): sample.value
        for sample in samples
    }


def test_a_runs_state_is_served_and_the_port_is_free_afterwards(tmp_path: Path) -> None:
    port = free()
    settings = LogConfig(tensorboard=False, metrics_port=port)
    with RunLog(tmp_path / "named", settings, 10) as log:
        log.step(replace(metrics(1), loss=0.5, prefix_tokens=100, seconds={"student": 2.5}))
        log.step(replace(metrics(2), loss=0.25, prefix_tokens=50, skipped=True))
        log.event("servers", "lost one")
        log.servers(3)
        found = read(port)
    prefix = "megatron_prefix_"
    assert found[(f"{prefix}step", "")] == 2
    assert found[(f"{prefix}loss", "")] == 0.25
    assert found[(f"{prefix}prefix_tokens_total", "")] == 150
    assert found[(f"{prefix}skipped_total", "")] == 1
    assert found[(f"{prefix}servers", "")] == 3
    assert found[(f"{prefix}events_total", "servers")] == 1
    assert any(name == f"{prefix}phase_seconds" for name, _ in found)
    MetricsPage("127.0.0.1", port, "named").close()


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"log.metrics_port={port} of 127.0.0.1 cannot be had"
        ):
            MetricsPage("127.0.0.1", port, "named")
