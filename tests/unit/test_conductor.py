"""Rank 0's decisions: windows, and steps whose rollouts hold nothing to train on."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_prefix.conductor import Conductor, Staff
from megatron_prefix.config import (
    AdaptiveConfig,
    LogConfig,
    ModeConfig,
    PrefixConfig,
    RecallConfig,
    Recipe,
    TrainConfig,
    WindowConfig,
)
from megatron_prefix.data.sources import RecordedSource, ReplaySource, RolloutSource
from megatron_prefix.evaluation.beside import Evaluator
from megatron_prefix.evaluation.evaluate import EvalResult
from megatron_prefix.health.phases import Phases
from megatron_prefix.prefix import Ledger, ModelShape, build_policy
from megatron_prefix.prefix.recall import Recall
from megatron_prefix.rollout.discarded import Discarded
from megatron_prefix.rollout.protocol import NoRollouts
from megatron_prefix.rollout.records import load_record
from megatron_prefix.run_files.jsonl import read_records
from megatron_prefix.run_files.log import RunLog
from megatron_prefix.types import Rollout, StepMetrics

SHAPE = ModelShape(2, 64, 4, 4, 16, 2 * 192, 46)
WINDOW = PrefixConfig("window", 1, 9, window=WindowConfig(start=5))


def rollouts(*lengths: int) -> list[Rollout]:
    return [
        Rollout((1, 2), (3,) * length, (0.0,) * length, "stop", 0, index)
        for index, length in enumerate(lengths)
    ]


class Listed:
    """Rollouts from a list, a step's each."""

    def __init__(self, steps: Sequence[list[Rollout]]) -> None:
        self.steps, self.asked = list(steps), 0

    def sample(self, step: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        self.asked += 1
        return self.steps[(self.asked - 1) % len(self.steps)]

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert not state


def conductor(
    folder: Path,
    prefix: PrefixConfig,
    source: RolloutSource,
    warmup_steps: int = 0,
    *,
    agreement: bool = True,
    recall: Recall | None = None,
    evaluate: Evaluator | None = None,
    discarded: Discarded | None = None,
) -> Conductor:
    train, mode = TrainConfig(steps=4, max_skipped_steps=3), ModeConfig(warmup_steps=warmup_steps)
    log = LogConfig(tensorboard=False, probe_interval=2, probe_agreement=agreement)
    recipe = Recipe(prefix=prefix, train=train, mode=mode, log=log)
    staff = Staff(
        policy=build_policy(prefix, 4),
        source=source,
        ledger=Ledger(SHAPE, SHAPE, prefix.max_length),
        open_log=lambda step: RunLog(folder, log, 4, resume_step=step),
        decode=str,
        evaluate=evaluate,
        probe=lambda policy_version: source.sample(0, prefix.max_length, policy_version),
        stop_requested=lambda: False,
        recall=recall,
        discarded=discarded or Discarded(),
        vocabularies={"": SHAPE.vocab},
    )
    return Conductor(recipe, staff)


def metrics(step: int, kl_L: np.ndarray, tokens_L: np.ndarray) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=0.5,
        kl_by_position=kl_L,
        tokens_by_position=tokens_L,
        grad_norm=1.0,
        lr=1e-3,
        skipped=False,
        prefix_length=len(kl_L),
        prefix_tokens=int(tokens_L.sum()),
        prompt_tokens=2,
        cut_fraction=1.0,
        policy_version=step - 1,
        policy_lag=0.0,
        logprob_diff_max=0.0,
        logprob_diff_mean=0.0,
    )


def test_an_order_carries_its_window(tmp_path: Path) -> None:
    order = conductor(tmp_path, WINDOW, Listed([rollouts(9, 3)])).order(0, 0)
    assert (order.kind, order.prefix_length, order.loss_start) == ("train", 9, 5)
    assert [len(rollout.prefix_ids) for rollout in order.rollouts] == [9, 3]
    whole = conductor(tmp_path, PrefixConfig("fixed", 9, 9), Listed([rollouts(1)])).order(0, 0)
    assert (whole.prefix_length, whole.loss_start) == (9, 0)


def test_rollouts_that_end_before_the_window_are_asked_for_anew_and_told(tmp_path: Path) -> None:
    source = Listed([rollouts(5, 3), rollouts(2, 6)])
    under_test = conductor(tmp_path, WINDOW, source)
    order = under_test.order(0, 0)
    under_test.close()
    assert source.asked == 2 and len(order.rollouts[1].prefix_ids) == 6
    (event,) = read_records(tmp_path / "events.jsonl")
    assert event["kind"] == "empty"
    assert "no prefix token from position 5 on in 2 rollouts, the longest of 5" in event["message"]


def test_a_supervised_step_is_ordered_as_such_and_moves_no_policy(tmp_path: Path) -> None:
    prefix = PrefixConfig("adaptive", 3, 9, adaptive=AdaptiveConfig(threshold=9.0))
    under_test = conductor(tmp_path, prefix, Listed([rollouts(3), rollouts(3)]), warmup_steps=1)
    for step, supervised in enumerate((True, False)):
        order = under_test.order(step, 0)
        assert (order.prefix_length, order.supervised) == (3, supervised)
        kl, tokens = np.full(3, 0.5), np.ones(3, np.int64)
        under_test.record(metrics(step + 1, kl, tokens), order, Phases(lambda: None))
    assert under_test.order(1, 0).prefix_length == 5  # the second step's KL alone counted
    under_test.close()
    first, second = read_records(tmp_path / "metrics.jsonl")
    assert first["flops"]["teacher"] == 0.0 < second["flops"]["teacher"]


def test_what_was_thrown_away_is_in_the_steps_line_once(tmp_path: Path) -> None:
    discarded, prefix = Discarded(), PrefixConfig("window", 1, 9, window=WindowConfig(start=5))
    source = Listed([rollouts(5, 3), rollouts(9, 6), rollouts(9, 6)])
    under_test = conductor(tmp_path, prefix, source, discarded=discarded)
    discarded.add([(2, 7), (2, 0)])  # a straggler, and one that never left the queue
    lines = []
    for step in (0, 1):
        order = under_test.order(step, 0)
        under_test.record(metrics(step + 1, np.ones(9), np.ones(9)), order, Phases())
        lines.append(order.discarded)
    under_test.close()
    assert lines == [((2, 7), (2, 5), (2, 3)), ()]
    first, second = read_records(tmp_path / "metrics.jsonl")
    thrown_away = Ledger(SHAPE, SHAPE, 9).measure_answers(lines[0]).rollout
    spent = first["flops"]["rollout"] - second["flops"]["rollout"]
    assert spent == pytest.approx(thrown_away) and spent > 0
    assert first["flops"]["teacher"] == second["flops"]["teacher"]


def test_the_ledger_of_a_replay_is_that_of_the_recorded_run(tmp_path: Path) -> None:
    class Straggling(Listed):
        """Each batch leaves a straggler behind, and the first holds nothing in the window."""

        def sample(self, step: int, prefix_length: int, policy_version: int) -> list[Rollout]:
            live.add([(2, 4 + self.asked), (2, 0)])
            return super().sample(step, prefix_length, policy_version)

    live, replayed, recording = Discarded(), Discarded(), tmp_path / "rollouts"
    batches = [rollouts(5, 3), rollouts(9, 6), rollouts(7, 8)]
    sources = {
        "live": (RecordedSource(Straggling(batches), recording, live), live),
        "replayed": (ReplaySource(recording, replayed), replayed),
    }
    lines = {}
    for name, (source, discarded) in sources.items():
        under_test = conductor(tmp_path / name, WINDOW, source, discarded=discarded)
        for step in (0, 1):
            order = under_test.order(step, 0)
            under_test.record(metrics(step + 1, np.ones(9), np.ones(9)), order, Phases())
        lines[name] = [each["flops"] for each in read_records(tmp_path / name / "metrics.jsonl")]
        lines[name] += [under_test.state_dict()["ledger"]]
        under_test.close()
    assert load_record(recording, 0)[1] == [(2, 4), (2, 5), (2, 3), (2, 5)]
    assert lines["live"] == lines["replayed"]


def test_a_student_that_always_ends_at_once_ends_the_run_with_words(tmp_path: Path) -> None:
    source = Listed([rollouts(1)] * 9)
    with pytest.raises(ValueError, match=r"no prefix token from position 5 .* 3 times in a row"):
        conductor(tmp_path, WINDOW, source).order(0, 0)
    assert source.asked == 3


class Aborted(Listed):
    """The first ``times`` of asking give nothing: somebody aborts all requests."""

    def __init__(self, times: int, steps: Sequence[list[Rollout]]) -> None:
        super().__init__(steps)
        self.times = times

    def sample(self, step: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        found = super().sample(step, prefix_length, policy_version)
        if self.asked <= self.times:
            raise NoRollouts("none of 2 rollouts is usable: all were aborted or empty")
        return found


def test_a_step_whose_rollouts_were_all_aborted_asks_for_others_and_says_so(
    tmp_path: Path,
) -> None:
    source = Aborted(2, [rollouts(3, 4)])
    under_test = conductor(tmp_path / "some", PrefixConfig("fixed", 9, 9), source)
    assert under_test.order(0, 0).kind == "train" and source.asked == 3
    under_test.close()
    events = list(read_records(tmp_path / "some" / "events.jsonl"))
    assert [event["kind"] for event in events] == ["empty", "empty"]
    assert "all were aborted" in events[0]["message"]
    lasting = conductor(tmp_path / "all", PrefixConfig("fixed", 9, 9), Aborted(9, [rollouts(3)]))
    with pytest.raises(ValueError, match=r"all were aborted or empty, and so 3 times in a row"):
        lasting.order(0, 0)
    lasting.close()


def test_a_probe_whose_rollouts_were_all_aborted_is_left_out_and_told(tmp_path: Path) -> None:
    under_test = conductor(tmp_path, PrefixConfig("fixed", 3, 9), Aborted(1, [rollouts(9)]))
    assert under_test.probe_order(2, 0).rollouts == ()
    assert len(under_test.probe_order(4, 0).rollouts) == 1
    under_test.close()
    (event,) = read_records(tmp_path / "events.jsonl")
    assert event["kind"] == "empty" and "no probe after step 2: none of 2" in event["message"]


def test_an_evaluation_whose_answers_were_aborted_is_left_out_and_told(tmp_path: Path) -> None:
    def aborted(step: int, policy_version: int, roster: object) -> EvalResult:
        raise NoRollouts("5 answers were asked for and 0 came")

    under_test = conductor(
        tmp_path, PrefixConfig("fixed", 9, 9), Listed([rollouts(3)]), evaluate=aborted
    )
    assert under_test.evaluate(4, 0).kind == "nothing"
    under_test.close()
    (event,) = read_records(tmp_path / "events.jsonl")
    assert event["message"] == "no evaluation of step 4: 5 answers were asked for and 0 came"
    assert not list(read_records(tmp_path / "evaluations.jsonl"))


def test_a_probe_is_told_apart_from_the_prefix(tmp_path: Path) -> None:
    prefix = PrefixConfig("fixed", 3, 9)
    under_test = conductor(tmp_path, prefix, Listed([rollouts(9, 4), rollouts(0, 0)]))
    order = under_test.probe_order(2, 0)
    assert (order.kind, order.prefix_length, len(order.rollouts)) == ("probe", 9, 2)
    tokens = np.array([2.0, 2, 2, 2, 1, 1, 1, 1, 1])
    kl = np.array([0.5, 0.5, 0.2, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0])
    assert order.audit_length == 3
    under_test.record_probe(2, order, kl, tokens, 0.75)
    assert under_test.probe_order(4, 0).rollouts == ()  # every one ended at once
    under_test.close()
    (record,) = read_records(tmp_path / "probes.jsonl")
    assert (record["step"], record["prefix_length"], record["finished"]) == (2, 3, 2)
    assert record["kl_prefix"] == pytest.approx(0.4)
    assert record["kl_tail"] == pytest.approx((2 * 1.0 + 5 * 2.0) / 7)
    assert record["kl_by_position"] == kl.tolist()
    step = Ledger(SHAPE, SHAPE, 9).measure(order.rollouts).flops
    assert record["agreement"] == 0.75
    assert record["flops"]["student"] == pytest.approx(2 * step.student)  # two passes, and back
    assert record["flops"]["rollout"] == pytest.approx(step.rollout)


def test_a_probe_without_gradients_costs_one_forward(tmp_path: Path) -> None:
    under_test = conductor(
        tmp_path, PrefixConfig("fixed", 3, 9), Listed([rollouts(9, 4)]), agreement=False
    )
    order = under_test.probe_order(2, 0)
    assert order.audit_length == 0
    under_test.record_probe(2, order, np.ones(9), np.ones(9))
    under_test.close()
    (record,) = read_records(tmp_path / "probes.jsonl")
    assert record["agreement"] is None
    step = Ledger(SHAPE, SHAPE, 9).measure(order.rollouts).flops
    assert record["flops"]["student"] == pytest.approx(step.student / 3)


def test_a_prefix_that_is_all_there_is_agrees_with_itself(tmp_path: Path) -> None:
    under_test = conductor(tmp_path, PrefixConfig("fixed", 5, 9), Listed([rollouts(5, 4)]))
    order = under_test.probe_order(2, 0)
    assert order.audit_length == 0
    under_test.record_probe(2, order, np.ones(9), np.array([1.0] * 5 + [0.0] * 4))
    under_test.close()
    (record,) = read_records(tmp_path / "probes.jsonl")
    assert (record["agreement"], record["kl_tail"]) == (1.0, None)


def test_a_probe_moves_the_policy_and_its_state(tmp_path: Path) -> None:
    source = Listed([rollouts(9, 9)] * 3)
    under_test = conductor(tmp_path, PrefixConfig("audited", 4, 9), source)
    assert under_test.state_dict()["policy"] == {"length": 4}
    order = under_test.probe_order(0, 0)
    under_test.record_probe(0, order, np.ones(9), np.ones(9), 0.1)
    assert under_test.state_dict()["policy"] == {"length": 6}
    assert under_test.order(0, 0).prefix_length == 9  # what a recording of longer rollouts needs
    under_test.close()


def test_caps_are_recalled_and_kept(tmp_path: Path) -> None:
    whole = PrefixConfig("fixed", 9, 9)
    settings = RecallConfig(threshold=0.1, window=2, min_tokens=2, slack=1.0)
    under_test, other = (
        conductor(tmp_path / name, whole, Listed([rollouts(9)]), recall=recall)
        for name, recall in (("one", Recall(settings)), ("other", Recall(settings)))
    )
    order = under_test.order(0, 0)
    written = replace(order, rollouts=(*order.rollouts, replace(order.rollouts[0], written=True)))
    quiet = np.array([1.0, 1, 0.05, 0.05, 1, 1, 1, 1, 1])
    under_test.recall(written, [quiet, np.zeros(9)])
    state = json.loads(json.dumps(under_test.state_dict()))
    assert list(state["recall"].values()) == [4]
    other.resume(1, state | {"source": {}})
    assert other.state_dict()["recall"] == state["recall"]
    under_test.close()
    other.close()


def test_a_lost_tail_is_an_alarm_and_a_met_prefix_length_is_none(tmp_path: Path) -> None:
    under_test = conductor(tmp_path, PrefixConfig("fixed", 3, 9), Listed([rollouts(9, 9)] * 9))
    tail = np.array([0.5] * 3 + [1.0] * 6)
    worse = np.array([0.1] * 3 + [1.5] * 6)
    for step, kl, agreement in ((0, tail, 0.9), (2, tail, 0.8), (4, worse, 0.1)):
        order = under_test.probe_order(step, 0)
        under_test.record_probe(step, order, kl, np.ones(9), agreement)
    under_test.close()
    lost, apart = list(read_records(tmp_path / "events.jsonl"))
    assert (lost["kind"], apart["kind"]) == ("alarm", "alarm")
    assert "beyond position 3 is 1.5000 nats a token, 1.50 times what it was" in lost["message"]
    assert "prefix.policy=anchored" in lost["message"]
    assert "agree by 0.10 only" in apart["message"]
    assert all("\n" not in event["message"] for event in (lost, apart))
