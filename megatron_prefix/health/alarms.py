"""What a probe warns of, each with what can be done. Pure.

That a rollout of the *training* reaches the prefix length is no alarm: a prefix run does so by
design. Only probes, which may write up to prefix.max_length, can tell that a student goes astray.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_prefix.config import LogConfig
from megatron_prefix.run_files.kl_grid import mean_kl
from megatron_prefix.types import ProbeMetrics

Record = Mapping[str, Any]  # a line of probes.jsonl


def probe_alarms(log: LogConfig, now: ProbeMetrics, earlier: Sequence[Record]) -> list[str]:
    """One line for each thing that is wrong with the probe ``now``, given those before it."""
    found = (_tail(log, now, earlier), _agreement(log, now), _endless(now, earlier))
    return [message for message in found if message]


def _tail(log: LogConfig, now: ProbeMetrics, earlier: Sequence[Record]) -> str:
    """Against the lowest that any probe showed of the *same* positions, whatever its prefix."""
    beyond = slice(now.prefix_length, None)
    seen = [(_mean(record, beyond), int(record["step"])) for record in earlier]
    known = [pair for pair in seen if pair[0] > 0.0]
    if not log.alarm_tail or not known or not now.kl_tail > log.alarm_tail * min(known)[0]:
        return ""
    lowest, step = min(known)
    return (
        f"the KL beyond position {now.prefix_length} is {now.kl_tail:.4f} nats a token, "
        f"{now.kl_tail / lowest:.2f} times what it was after step {step}: the tail is being lost; "
        "raise prefix.min_length or take prefix.policy=anchored"
    )


def _agreement(log: LogConfig, now: ProbeMetrics) -> str:
    if not log.alarm_agreement or not now.agreement < log.alarm_agreement:
        return ""
    return (
        f"the prefix's gradient and the full rollout's agree by {now.agreement:.2f} only: "
        f"{now.prefix_length} tokens no longer teach what the whole would; raise "
        "prefix.min_length or take prefix.policy=audited"
    )


def _endless(now: ProbeMetrics, earlier: Sequence[Record]) -> str:
    ended = max((record["finished"] / record["rollouts"] for record in earlier), default=0.0)
    if now.finished or ended < 0.5:
        return ""
    return (
        f"none of {now.rollouts} probe rollouts ended within prefix.max_length, where once "
        f"{ended:.0%} did: the student forgets to end; take prefix.policy=anchored"
    )


def _mean(record: Record, positions: slice) -> float:
    """NaN where that probe reached none of the positions."""
    kl_L = np.array(record["kl_by_position"][positions], np.float64)  # null becomes NaN
    return mean_kl(kl_L, np.array(record["tokens_by_position"][positions]))
