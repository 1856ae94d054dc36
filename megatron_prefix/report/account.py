"""A run's ledger out of its JSON lines: FLOPs and tokens by part."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_prefix.report.story import RunStory
from megatron_prefix.run_history import FLOPS_PARTS

PARTS = (*FLOPS_PARTS, "probes", "evaluation")


@dataclass(frozen=True)
class Account:
    """FLOPs by part, NaN where the run's version did not count them, and tokens sampled."""

    flops: Mapping[str, float]  # by PARTS
    tokens: Mapping[str, int]  # sampled: rollout, probes, evaluation
    full: float  # of training, had each rollout gone on to the full length

    @property
    def training(self) -> float:
        return sum(self.flops[part] for part in FLOPS_PARTS)

    @property
    def total(self) -> float:
        """Of what is known."""
        return float(np.nansum(list(self.flops.values())))

    @property
    def ratio(self) -> float:
        """Training's FLOPs as a share of the counterfactual's; NaN where that counts none."""
        return self.training / self.full if self.full else float("nan")


def account_of(story: RunStory) -> Account:
    history = story.history
    flops = dict(zip(FLOPS_PARTS, history.flops.sum(axis=0).tolist(), strict=True))
    flops["probes"] = sum(
        sum(value or 0.0 for value in probe["flops"].values()) for probe in story.probes
    )
    flops["evaluation"] = float(sum(each.flops for each in history.evaluations))
    tokens = {
        "rollout": int(history.prefix_tokens.sum()),
        "probes": sum(sum(probe["tokens_by_position"]) for probe in story.probes),
        "evaluation": sum(each.tokens for each in history.evaluations),
    }
    return Account(flops, tokens, float(history.flops_full.sum()))
