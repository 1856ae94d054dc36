"""What a run has spent: the sums over the JSON lines that its folder holds, and nothing else.

A step that a resumed run takes again is counted once, since its first line is moved away; an
evaluation that was made twice has two lines and counts twice.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_prefix.run_files import jsonl
from megatron_prefix.run_files.whole_file import whole_file
from megatron_prefix.types import Flops

PARTS = ("rollout", "teacher", "student", "probes", "evaluation")
LEDGER = "ledger.json"  # the account so far, renewed while the run goes on


@dataclass(frozen=True)
class Account:
    """Sums from a run's first step on. FLOPs and tokens of probes and evaluations are no part of
    training's, nor of the counterfactual."""

    flops: Flops = field(default_factory=Flops)  # of training
    flops_full: Flops = field(default_factory=Flops)  # the same steps at full length
    probes: float = 0.0  # FLOPs
    evaluation: float = 0.0  # FLOPs; NaN where lines of an earlier version do not tell them
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    discarded_tokens: int = 0  # sampled and thrown away: past a cut, or of stragglers
    probe_tokens: int = 0  # sampled
    evaluation_tokens: int = 0  # sampled
    seconds: float = 0.0  # of the steps' phases; probes, evaluations and start left out

    @property
    def ratio(self) -> float:
        """Training's FLOPs as a share of the counterfactual's; NaN where that counts none."""
        return self.flops.total / self.flops_full.total if self.flops_full.total else math.nan

    @property
    def total(self) -> float:
        """FLOPs of training, probes and evaluations, as far as they were counted."""
        counted = 0.0 if math.isnan(self.evaluation) else self.evaluation
        return self.flops.total + self.probes + counted

    @property
    def by_part(self) -> dict[str, float]:
        """FLOPs by ``PARTS``."""
        return {**vars(self.flops), "probes": self.probes, "evaluation": self.evaluation}

    @property
    def tokens(self) -> dict[str, int]:
        """Sampled, by part."""
        return {
            "rollout": self.prefix_tokens + self.discarded_tokens,
            "probes": self.probe_tokens,
            "evaluation": self.evaluation_tokens,
        }

    def __add__(self, other: "Account") -> "Account":
        return Account(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(account: Account) -> list[Any]:
    return list(vars(account).values())


def of_step(record: Mapping[str, Any]) -> Account:
    """One line of metrics.jsonl; a null (a value that was not finite) adds nothing."""
    return Account(
        flops=_flops(record["flops"]),
        flops_full=_flops(record["flops_full"]),
        prompt_tokens=record["prompt_tokens"],
        prefix_tokens=record["prefix_tokens"],
        discarded_tokens=record.get("discarded_tokens", 0),  # lines of an earlier version: none
        seconds=sum(value or 0.0 for value in record["seconds"].values()),
    )


def of_probe(record: Mapping[str, Any]) -> Account:
    """One line of probes.jsonl."""
    tokens = sum(record["tokens_by_position"])
    return Account(probes=_flops(record["flops"]).total, probe_tokens=tokens)


def of_evaluation(record: Mapping[str, Any]) -> Account:
    """One line of evaluations.jsonl."""
    flops = record.get("flops")
    return Account(
        evaluation=math.nan if flops is None else flops, evaluation_tokens=record["tokens"]
    )


def read_account(folder: Path) -> Account:
    """Of the whole lines in a run's folder; those of a file that is missing are none."""
    kinds = ((jsonl.METRICS, of_step), (jsonl.PROBES, of_probe), (jsonl.EVALUATIONS, of_evaluation))
    return total(of(record) for name, of in kinds for record in jsonl.read_records(folder / name))


def total(accounts: Iterable[Account]) -> Account:
    return sum(accounts, Account())


def account_record(account: Account) -> dict[str, Any]:
    """JSON's form, with the sums and the ratio that follow."""
    record = jsonl.metrics_record(account)
    return record | {"total": account.total, "ratio": jsonl.number(account.ratio)}


def write_account(account: Account, folder: Path) -> None:
    """Renews ``ledger.json``; a reader finds the old one or the new one, whole."""
    text = json.dumps(account_record(account), indent=2, allow_nan=False)
    with whole_file(folder / LEDGER) as file:
        file.write_text(text + "\n", encoding="utf-8")


def _flops(record: Mapping[str, float | None]) -> Flops:
    return Flops(**{part: value or 0.0 for part, value in record.items()})
