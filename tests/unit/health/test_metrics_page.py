"""What Prometheus would read of a run, over HTTP."""

import json
import re
import socket
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from megatron_prefix.config import LogConfig
from megatron_prefix.health.metrics_page import PREFIX, TARGETS, MetricsPage, announced
from megatron_prefix.health.slow_phases import StepTimes, Verdict
from megatron_prefix.run_files.account import read_account
from megatron_prefix.run_files.log import RunLog
from megatron_prefix.types import Flops
from tests.unit.run_files.test_run_log import metrics


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def samples(port: int) -> list[Sample]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return [sample for family in families for sample in family.samples]


def read(port: int) -> dict[tuple[str, str], float]:
    """By sample name and its label besides the run's."""
    found = samples(port)
    assert {sample.labels["run"] for sample in found} == {"named"}
    return {
        (
            sample.name.removeprefix(PREFIX),
            " ".join(v for k, v in sample.labels.items() if k != "run"),
        ): sample.value
        for sample in found
    }


@dataclass(frozen=True)
class Evaluation:
    accuracy: float = 0.75
    n: int = 4
    truncated: int = 0
    unparsable: int = 0
    tokens: int = 40
    seconds: float = 1.0


def tell(log: RunLog) -> None:
    """Everything that a run can say to its page."""
    log.evaluation(0, Evaluation(), Flops(rollout=50.0))
    first, second = Flops(10.0, 20.0, 30.0), Flops(rollout=5.0)
    log.step(replace(metrics(1), loss=0.5, prefix_tokens=100, seconds={"student": 2.5}))
    log.step(
        replace(
            metrics(2),
            loss=0.25,
            prefix_tokens=50,
            policy_version=7,
            skipped=True,
            seconds={"student": 2.5},
            flops=first,
            flops_full=first + second,
        )
    )
    log.event("servers", "lost one")
    log.servers(3)
    seconds, still = np.array([[2.5], [2.5]]), np.array([0.0, 1.5])
    times = StepTimes(("student",), seconds, still, work=np.array([0.001, 0.004]))
    log.times(times, Verdict())
    log.times(times, Verdict("rank 1 (here) is slow", "student", 1))


def test_a_runs_state_is_served_and_the_port_is_free_afterwards(tmp_path: Path) -> None:
    port = free()
    settings = LogConfig(tensorboard=False, metrics_port=port)
    with RunLog(tmp_path / "named", settings, 10) as log:
        tell(log)
        found = read(port)
    steps = read_account(tmp_path / "named")
    assert found["step", ""] == 2
    assert found["loss", ""] == 0.25
    assert found["policy_version", ""] == 7
    assert found["prefix_length", ""] == metrics(2).prefix_length
    assert found["prefix_tokens_total", ""] == 150
    assert found["skipped_total", ""] == 1
    assert found["servers", ""] == 3
    assert found["events_total", "servers"] == found["events_total", "slow"] == 1
    assert found["phase_seconds", "student"] == 2.5
    assert (found["total_steps", ""], found["eta_seconds", ""]) == (10, 20.0)
    assert found["tokens_per_second", ""] > 0
    assert abs(found["last_step_time_seconds", ""] - time.time()) < 300
    assert (found["rank_work_seconds", "0"], found["rank_work_seconds", "1"]) == (0.001, 0.004)
    assert found["rank_stood_still_seconds", "1"] == 1.5
    assert found["slow_total", "student 1"] == 1
    assert found["evaluation_accuracy", ""] == 0.75
    for part, value in steps.by_part.items():
        assert found["flops_total", part] == value
    assert found["flops_full_total", "rollout"] == steps.flops_full.rollout > 0
    assert found["flops_ratio", ""] == steps.ratio < 1
    MetricsPage("127.0.0.1", port, "named", 10).close()


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    port = free()
    settings = LogConfig(tensorboard=False, metrics_port=port)
    with RunLog(tmp_path / "named", settings, 10) as log:
        tell(log)
    with RunLog(tmp_path / "named", settings, 10, resume_step=1) as log:
        log.step(replace(metrics(2), prefix_tokens=1000, seconds={"student": 2.5}))
        assert read(port)["prefix_tokens_total", ""] == 1100


def test_the_page_on_operations_names_every_metric(tmp_path: Path) -> None:
    port = free()
    settings = LogConfig(tensorboard=False, metrics_port=port)
    with RunLog(tmp_path / "named", settings, 10) as log:
        tell(log)
        served = {sample.name for sample in samples(port)}
    text = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    assert set(re.findall(r"`(megatron_prefix_\w+)", text)) == served


def test_prometheus_finds_the_pages_in_a_file_while_the_run_goes_on(tmp_path: Path) -> None:
    settings = LogConfig(metrics_port=9100)
    with announced(tmp_path / "named", settings, ["http://10.0.0.1:81", "https://node2:82"]):
        trainer, servers = json.loads((tmp_path / "named" / TARGETS).read_text())
    assert trainer["targets"] == ["127.0.0.1:9100"]
    assert servers["targets"] == ["10.0.0.1:81", "node2:82"]
    assert servers["labels"] == {"job": "sglang", "run": "named"}
    assert not (tmp_path / "named" / TARGETS).exists()
    with announced(tmp_path / "alone", settings, []):
        assert len(json.loads((tmp_path / "alone" / TARGETS).read_text())) == 1


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"log.metrics_port={port} of 127.0.0.1 cannot be had"
        ):
            MetricsPage("127.0.0.1", port, "named", 10)
