"""The account of a run: the sums over its JSON lines, renewed while it runs and on a resume."""

import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from megatron_prefix.config import LogConfig
from megatron_prefix.prefix import Ledger, ModelShape
from megatron_prefix.prefix.flops import head_flops, trunk_flops
from megatron_prefix.run_files.account import Account, account_record, read_account
from megatron_prefix.run_files.log import RunLog, spent_words
from megatron_prefix.types import Flops
from tests.run_folders import Answers, metrics, probe, write_whole_run


def by_hand(folder: Path) -> float:
    """FLOPs of every line of a run."""

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (folder / name).read_text().splitlines()]

    stepped = sum(sum(line["flops"].values()) for line in lines("metrics.jsonl"))
    probed = sum(sum(line["flops"].values()) for line in lines("probes.jsonl"))
    return stepped + probed + sum(line["flops"] for line in lines("evaluations.jsonl"))


def test_the_account_is_the_sum_of_the_lines(tmp_path: Path) -> None:
    run = write_whole_run(tmp_path)
    account = read_account(run)
    assert account.by_part == {
        "rollout": 12e9, "teacher": 24e9, "student": 36e9, "probes": 16e9, "evaluation": 20e9
    }  # fmt: skip
    assert account.total == by_hand(run) == 108e9
    assert (account.flops_full.total, account.ratio) == (144e9, 0.5)
    tokens = {"rollout": sum(8 * (1 + s) for s in range(1, 13)), "probes": 640, "evaluation": 1200}
    assert account.tokens == tokens
    assert json.loads((run / "ledger.json").read_text()) == account_record(account)


def test_a_resume_takes_the_account_up_and_counts_nothing_twice(tmp_path: Path) -> None:
    run = write_whole_run(tmp_path)
    whole = read_account(run)
    log = LogConfig(tensorboard=False, probe_interval=4)
    with RunLog(run, log, 12, console=Console(quiet=True), resume_step=6) as again:
        assert again.account.flops.total == 36e9 and again.account.probes == 8e9
        for step in range(7, 13):
            again.step(metrics(step, 2 + step, 2.0 / step))
            if step % 4 == 0:
                again.probe(probe(step))
                again.evaluation(step, Answers(0.5), Flops(rollout=5e9))
    assert read_account(run) == whole
    assert json.loads((run / "ledger.json").read_text())["total"] == by_hand(run)


def test_what_was_not_counted_is_no_zero() -> None:
    old = Account(flops=Flops(1.0, 1.0, 1.0), evaluation=math.nan)
    record = account_record(old)
    assert record["evaluation"] is None and record["total"] == 3.0 and record["ratio"] is None


def test_the_console_tells_what_training_spent_beside_the_share_that_is_of_it() -> None:
    spent = Account(
        flops=Flops(1e12, 2e12, 3e12),
        flops_full=Flops(1e12, 2e12, 9e12),
        probes=2e12,
        evaluation=5e12,
    )
    assert spent_words(spent) == "6 TFLOP 0.50x"


def test_an_answer_costs_the_sampler_alone() -> None:
    shape = ModelShape(2, 64, 4, 4, 16, 2 * 192, 46)
    answers = [(14, 75), (9, 0)]
    measured = Ledger(shape, shape, 75).measure_answers(answers)
    expected = trunk_flops(shape, 14 + 74) + head_flops(shape, 75) + trunk_flops(shape, 9)
    assert measured == Flops(rollout=pytest.approx(expected))
