"""Full-length rollouts of a run, as ``megatron-prefix advise`` reads them. Pure.

Legend: M positions of a full rollout, R records (probes or steps) of full-length rollouts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_prefix.config import Recipe
from megatron_prefix.run_files import jsonl

STEPS = 10  # of full length that are read where a run has no probes: the student moves on


@dataclass(frozen=True)
class Pilot:
    """What full-length rollouts showed, and how long steps took."""

    source: str  # "probe after step 0", "4 full-length steps from step 1"
    step: int  # finished steps of the student that wrote them
    kl: np.ndarray  # float64 [R, M] mean by position, 0 without a token
    tokens: np.ndarray  # int64 [R, M] rollouts that had a token there
    prompt_length: float  # tokens, mean
    unfinished: int  # rollouts that the full length ended; -1: steps do not tell them from others
    seconds: Mapping[str, float]  # median by phase of the steps that were timed; empty: none
    seconds_tokens: float  # mean prefix tokens a rollout of those steps

    @property
    def rollouts(self) -> int:
        return int(self.tokens[:, 0].sum())

    @property
    def max_length(self) -> int:
        return self.kl.shape[1]

    @property
    def mass(self) -> np.ndarray:
        """[R, M] KL summed over tokens: what a step would learn from at each position."""
        return self.kl * self.tokens

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(length, rollouts of that length) of the full rollouts."""
        reached = np.append(np.maximum.accumulate(self.tokens.sum(axis=0)[::-1])[::-1], 0)
        ended = reached[:-1] - reached[1:]
        return [(i + 1, int(count)) for i, count in enumerate(ended) if count]


def read_pilot(folder: Path, recipe: Recipe, step: int | None = None) -> Pilot:
    """The run's first probe (or that after ``step``), else its first full-length steps.

    ValueError where there is neither, or nothing in them that could be learned.
    """
    probes = list(jsonl.read_records(folder / jsonl.PROBES))
    steps = list(jsonl.read_records(folder / jsonl.METRICS))
    pilot = _of_probes(probes, steps, step) if probes else _of_steps(steps, recipe, step)
    if pilot is None:
        at = "" if step is None else f" after step {step}"
        raise ValueError(
            f"{folder} has no full-length rollouts{at}: neither a probe (log.probe_interval) nor "
            f"steps of prefix.max_length={recipe.prefix.max_length}; make a pilot with "
            f"megatron-prefix advise {folder}/recipe.yaml"
        )
    if not pilot.mass.sum() > 0:
        raise ValueError(
            f"{folder}: the {pilot.source} shows no KL at any position; student and teacher agree "
            "there, and no prefix is better than another"
        )
    return pilot


def _of_probes(
    probes: Sequence[Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], step: int | None
) -> Pilot | None:
    found = [probe for probe in probes if step is None or probe["step"] == step]
    if not found:
        return None
    probe = found[0]
    unfinished = probe["rollouts"] - probe["finished"]
    source = f"probe after step {probe['step']}"
    return _pilot(source, probe["step"], [probe], steps, unfinished)


def _of_steps(steps: Sequence[Mapping[str, Any]], recipe: Recipe, step: int | None) -> Pilot | None:
    """A step's KL is that of the weights before it."""
    full = [
        record
        for record in steps
        if record["prefix_length"] == recipe.prefix.max_length
        and record["step"] > (step or 0)
        and record["tokens_by_position"][0]  # no window of the loss
        and not record.get("supervised")
    ][:STEPS]
    if not full:
        return None
    source = f"{len(full)} full-length steps from step {full[0]['step']}"
    return _pilot(source, full[0]["step"] - 1, full, full, unfinished=-1)


def _pilot(
    source: str,
    step: int,
    records: Sequence[Mapping[str, Any]],
    timed: Sequence[Mapping[str, Any]],
    unfinished: int,
) -> Pilot:
    kl = np.array([record["kl_by_position"] for record in records], dtype=np.float64)
    phases = timed[0]["seconds"] if timed else {}
    rollouts = [record["tokens_by_position"][0] or 1 for record in timed]
    prompts = [record["prompt_tokens"] for record in timed]
    prefixes = [record["prefix_tokens"] for record in timed]
    return Pilot(
        source=source,
        step=step,
        kl=np.nan_to_num(kl),
        tokens=np.array([record["tokens_by_position"] for record in records], dtype=np.int64),
        prompt_length=sum(prompts) / max(sum(rollouts), 1),
        unfinished=unfinished,
        seconds={
            phase: float(np.median([record["seconds"].get(phase) or 0.0 for record in timed]))
            for phase in phases
        },
        seconds_tokens=sum(prefixes) / max(sum(rollouts), 1),
    )
