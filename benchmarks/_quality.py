"""How well SORT-CHAIN's held-out problems were answered."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from megatron_prefix.run_files.jsonl import read_records
from megatron_prefix.tasks import sort_chain


@dataclass(frozen=True)
class Quality:
    """Shares of the held-out prompts, but for execution: of those with a valid plan."""

    accuracy: float
    plan: float
    execution: float | None  # None: no plan was valid


def quality_of(answers: Path) -> Quality:
    """Scores an evaluation's samples against the held-out problems they answer."""
    problems = sort_chain.make_problems(sort_chain.NUM_HELD_OUT, sort_chain.HELD_OUT_SEED)
    scored = []
    for record in read_records(answers):
        problem = problems[record["row"]]
        assert problem.prompt == record["prompt"], f"{answers}: row {record['row']}"
        end = "$" if record["finish_reason"] == "stop" else ""
        scored.append(sort_chain.score(problem, record["generated"] + end))
    executed = [score.execution for score in scored if score.valid_plan]
    return Quality(
        accuracy=statistics.fmean(score.accuracy for score in scored),
        plan=statistics.fmean(score.plan for score in scored),
        execution=statistics.fmean(executed) if executed else None,
    )
