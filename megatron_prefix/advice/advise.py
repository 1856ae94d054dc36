"""From a pilot to advice: how much of the signal a prefix of each length holds, and what it saves.

The *signal* at a position is the KL of all rollouts there, the sum that a step's gradient is made
of. A share of it says where a student differs from its teacher, not what training there is worth:
a student that stops being trained on its tail may lose it (docs/prefix-policies.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from megatron_prefix.advice.pilot import Pilot
from megatron_prefix.config import PrefixConfig
from megatron_prefix.prefix import ModelShape, build_policy
from megatron_prefix.prefix.flops import rollout_flops
from megatron_prefix.types import Flops

SHARES = (0.5, 0.75, 0.8, 0.9, 0.95, 0.99)
POLICIES = ("anchored", "linear", "late", "fixed")
# A prefix is short where it holds so much more of the signal than of the length: on SORT-CHAIN 0.4
# to 0.6 for the student that every schedule helped, 0.05 for the one that none did.
CONCENTRATED = 0.25
FEW_ROLLOUTS, FEW_AT_THE_END = 32, 8


@dataclass(frozen=True)
class Option:
    """A fixed prefix length. Ratios are of full length, for the same number of rollouts."""

    length: int
    share: float  # of the signal that lies within
    flops: float  # ratio
    seconds: float | None  # ratio, estimated; None: the pilot timed no step


@dataclass(frozen=True)
class Advice:
    options: tuple[Option, ...]  # by length
    share: float  # that was asked for; 0: none, and the length is the signal's knee
    length: int  # the shortest that holds it
    concentration: float  # share of the signal within ``length``, less the share of the length
    spread: tuple[int, int]  # the shortest and longest that single records of the pilot ask for
    prefix: PrefixConfig  # the policy to take
    flops: float  # of that policy over the run, as a ratio of full length
    seconds: float | None
    warnings: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """JSON's form."""
        return {**asdict(self), "prefix": {"policy": self.prefix.policy, **_own(self.prefix)}}


def shortest(mass: np.ndarray, share: float) -> int:
    """The least number of positions that hold ``share`` of ``mass`` [M]."""
    held = np.cumsum(mass)
    return int(np.searchsorted(held, share * held[-1] * (1 - 1e-12)) + 1)


def knee(mass: np.ndarray) -> int:
    """Where the signal held is furthest above the share of the length: from there on a token holds
    less than the average one."""
    return int(np.argmax(_excess(mass)) + 1)


def _excess(mass: np.ndarray) -> np.ndarray:
    """[M] share of ``mass`` held, less the share of the length."""
    return np.cumsum(mass) / mass.sum() - np.arange(1, len(mass) + 1) / len(mass)


class Costs:
    """FLOPs and seconds of the pilot's rollouts, had they been cut at some length."""

    def __init__(self, pilot: Pilot, student: ModelShape, teacher: ModelShape) -> None:
        self._pilot, self._models = pilot, (student, teacher)
        self._known: dict[int, Flops] = {}

    def flops(self, length: int) -> Flops:
        if length not in self._known:
            prompt = round(self._pilot.prompt_length)
            total = Flops()
            for whole, count in self._pilot.lengths:
                one = rollout_flops(*self._models, prompt, min(whole, length))
                total += Flops(one.rollout * count, one.teacher * count, one.student * count)
            self._known[length] = total
        return self._known[length]

    def seconds(self, length: int) -> float | None:
        """Of a step: sampling follows the tokens, teacher and student their FLOPs, and the other
        phases stay."""
        pilot = self._pilot
        if not pilot.seconds:
            return None
        timed = min(max(round(pilot.seconds_tokens), 1), pilot.max_length)
        here, there = self.flops(length), self.flops(timed)
        scale = {
            "rollout": length / timed,
            "teacher": here.teacher / there.teacher,
            "student": here.student / there.student,
        }
        return sum(scale.get(phase, 1.0) * value for phase, value in pilot.seconds.items())

    def option(self, length: int) -> Option:
        held = self._pilot.mass.sum(axis=0).cumsum()
        return Option(length, float(held[length - 1] / held[-1]), *self.ratios([length]))

    def ratios(self, lengths: Sequence[int]) -> tuple[float, float | None]:
        """FLOPs and seconds of steps of ``lengths``, each as a share of as many full ones."""
        full = self._pilot.max_length
        flops = sum(self.flops(length).total for length in lengths)
        spent, whole = [self.seconds(length) for length in lengths], self.seconds(full)
        seconds = sum(value for value in spent if value is not None)
        times = seconds / (len(lengths) * whole) if whole else None
        return flops / (len(lengths) * self.flops(full).total), times


def advise(
    pilot: Pilot, costs: Costs, share: float, base: PrefixConfig, steps: int, policy: str = ""
) -> Advice:
    """What to set, for a run of ``steps``; ``policy`` empty: what the signal's place asks for."""
    total = pilot.mass.sum(axis=0)
    length = shortest(total, share) if share else knee(total)
    rows = [row for row in pilot.mass if row.sum() > 0]
    spread = [shortest(row, share) if share else knee(row) for row in rows]
    lengths = {shortest(total, s) for s in SHARES} | {length, pilot.max_length}
    prefix = _policy(pilot, length, base, policy)
    chosen = build_policy(prefix, steps)
    flops, seconds = costs.ratios([chosen.length(step) for step in range(steps)])
    return Advice(
        options=tuple(costs.option(each) for each in sorted(lengths)),
        share=share,
        length=length,
        concentration=float(_excess(total)[length - 1]),
        spread=(min(spread), max(spread)),
        prefix=prefix,
        flops=flops,
        seconds=seconds,
        warnings=tuple(_warnings(pilot, length, prefix)),
    )


def _policy(pilot: Pilot, length: int, base: PrefixConfig, policy: str) -> PrefixConfig:
    full = pilot.max_length
    if not policy and _excess(pilot.mass.sum(axis=0))[length - 1] < CONCENTRATED:
        return replace(base, policy="fixed", min_length=full, max_length=full)
    return replace(base, policy=policy or "anchored", min_length=length, max_length=full)


def _warnings(pilot: Pilot, length: int, prefix: PrefixConfig) -> Iterator[str]:
    total = pilot.mass.sum(axis=0)
    beyond = 1 - total[:length].sum() / total.sum()
    at_end = int(pilot.tokens[:, length - 1].sum())
    if pilot.rollouts < FEW_ROLLOUTS:
        yield (
            f"thin evidence: {pilot.rollouts} rollouts; take {FEW_ROLLOUTS} or more "
            "(log.probe_rollouts, or a pilot of more steps)"
        )
    elif at_end < FEW_AT_THE_END:
        yield f"thin evidence: {at_end} of {pilot.rollouts} rollouts are {length} tokens long"
    filled = int(pilot.tokens[:, -1].sum())
    if pilot.unfinished < 0 and filled > 0.05 * pilot.rollouts:
        yield (
            f"{filled} of {pilot.rollouts} rollouts are as long as the limit; if they were cut "
            "there, the KL beyond it is not counted"
        )
    if pilot.unfinished > 0.05 * pilot.rollouts:
        yield (
            f"{pilot.unfinished} of {pilot.rollouts} rollouts did not end within "
            f"{pilot.max_length} tokens: what lies beyond was not seen"
        )
    if pilot.step:
        yield f"the student had taken {pilot.step} steps: at the start the signal lay elsewhere"
    if _excess(total)[length - 1] < CONCENTRATED:
        yield (
            f"the signal lies late, or everywhere alike: {length} of {pilot.max_length} tokens "
            f"hold {1 - beyond:.0%} of it. No schedule saved such a student anything on SORT-CHAIN"
        )
    if prefix.policy == "fixed" and prefix.min_length < pilot.max_length:
        yield (
            f"nothing trains what comes after {length} tokens ({beyond:.0%} of the signal): on "
            "SORT-CHAIN a small student lost its tail, and its accuracy, that way; anchored kept it"
        )


def _own(prefix: PrefixConfig) -> dict[str, Any]:
    """The settings that the policy reads."""
    values: dict[str, Any] = {"min_length": prefix.min_length, "max_length": prefix.max_length}
    if hasattr(prefix, prefix.policy):
        values[prefix.policy] = asdict(getattr(prefix, prefix.policy))
    return values


def block(prefix: PrefixConfig) -> str:
    """Python for a recipe: a ``PrefixConfig`` with the policy's own settings."""
    lines = [f'policy="{prefix.policy}"']
    lines += [f"min_length={prefix.min_length}", f"max_length={prefix.max_length}"]
    if hasattr(prefix, prefix.policy):
        lines.append(f"{prefix.policy}={getattr(prefix, prefix.policy)!r}")
    inside = "".join(f"    {line},\n" for line in lines)
    return f"prefix=PrefixConfig(\n{inside})"


def overrides(prefix: PrefixConfig) -> list[str]:
    """The same for a command line."""
    words = [f"prefix.policy={prefix.policy}"]
    for key, value in _own(prefix).items():
        if isinstance(value, dict):
            words += [f"prefix.{key}.{name}={each}" for name, each in value.items()]
        else:
            words.append(f"prefix.{key}={value}")
    return words
