"""What a probe warns of, and what it must not."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_prefix.config import LogConfig
from megatron_prefix.health.alarms import probe_alarms
from megatron_prefix.run_files.jsonl import metrics_record
from megatron_prefix.run_files.log import RunLog
from megatron_prefix.types import Flops, ProbeMetrics

LOG = LogConfig()


def probe(step: int, length: int, head: float, tail: float, **changes: float) -> ProbeMetrics:
    """Eight positions, with ``tail`` from position 4 on whatever the prefix length."""
    kl = np.array([head] * 4 + [tail] * 4)
    metrics = ProbeMetrics(
        step=step,
        prefix_length=length,
        kl_prefix=float(kl[:length].mean()),
        kl_tail=float(kl[length:].mean()) if length < 8 else float("nan"),
        kl_by_position=kl,
        tokens_by_position=np.full(8, 2),
        finished=2,
        rollouts=2,
        flops=Flops(),
        agreement=0.9,
    )
    return replace(metrics, **changes)  # type: ignore[arg-type]


def alarms(now: ProbeMetrics, *earlier: ProbeMetrics, log: LogConfig = LOG) -> list[str]:
    return probe_alarms(log, now, [metrics_record(one) for one in earlier])


def test_a_tail_is_compared_with_the_same_positions_of_the_probe_that_was_best_there() -> None:
    before, best = probe(0, 4, 2.0, 2.0), probe(10, 2, 0.5, 1.0)
    (told,) = alarms(probe(20, 4, 0.1, 1.3), before, best)
    assert "beyond position 4 is 1.3000 nats a token, 1.30 times what it was after step 10" in told
    assert alarms(probe(20, 4, 0.1, 1.2), before, best) == []


def test_the_first_probe_and_one_without_a_tail_warn_of_nothing() -> None:
    assert alarms(probe(0, 4, 2.0, 9.0)) == []
    assert alarms(probe(10, 8, 2.0, 9.0), probe(0, 8, 1.0, 1.0)) == []


def test_a_probe_without_a_tail_is_told_without_nans(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(tmp_path, LogConfig(tensorboard=False, probe_interval=8), 16)
    with caplog.at_level(logging.INFO, "megatron_prefix.run_files.log"):
        log.probe(probe(8, 8, 0.25, 0.25, agreement=float("nan")))
    log.close()
    told = "KL 0.2500 within the prefix of 8 tokens, beyond it -, gradients agree by -"
    assert told in caplog.text


def test_thresholds_of_zero_are_silent() -> None:
    silent = LogConfig(alarm_tail=0.0, alarm_agreement=0.0)
    now = probe(20, 4, 0.1, 9.0, agreement=-0.5)
    assert alarms(now, probe(0, 4, 1.0, 1.0), log=silent) == []
    assert len(alarms(now, probe(0, 4, 1.0, 1.0))) == 2


def test_an_agreement_that_was_not_measured_is_no_alarm() -> None:
    assert alarms(probe(20, 4, 0.1, 1.0, agreement=float("nan")), probe(0, 4, 1.0, 1.0)) == []


@pytest.mark.parametrize(("once", "warns"), [(2, True), (0, False)])
def test_rollouts_that_never_end_are_an_alarm_where_they_once_did(once: int, warns: bool) -> None:
    told = alarms(probe(20, 4, 0.1, 1.0, finished=0), probe(0, 4, 1.0, 1.0, finished=once))
    assert bool(told) is warns
    assert not warns or "none of 2 probe rollouts ended within prefix.max_length" in told[0]
