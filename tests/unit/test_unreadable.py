"""Rollouts with a token that their teacher does not have are nobody's to train on."""

from dataclasses import replace
from pathlib import Path

from megatron_prefix.config import PrefixConfig
from megatron_prefix.rollout.discarded import Discarded, unreadable
from megatron_prefix.run_files.jsonl import read_records
from megatron_prefix.types import Rollout
from tests.unit.test_conductor import SHAPE, Listed, conductor, rollouts

PREFIX = PrefixConfig("fixed", 9, 9)


def padded(rollout: Rollout) -> Rollout:
    return replace(rollout, prefix_ids=(*rollout.prefix_ids[:-1], SHAPE.vocab))


def test_each_teacher_has_a_vocabulary_of_its_own() -> None:
    known, other = (replace(padded(rollouts(3)[0]), domain=domain) for domain in ("math", "code"))
    vocabularies = {"math": SHAPE.vocab + 1, "code": SHAPE.vocab}
    assert unreadable([known, other, *rollouts(0)], vocabularies) == [other]


def test_they_are_thrown_away_with_a_word_and_counted(tmp_path: Path) -> None:
    good, bad = rollouts(4, 6)
    discarded = Discarded()
    source = Listed([[padded(good)], [good, padded(bad)]])
    under_test = conductor(tmp_path, PREFIX, source, discarded=discarded)
    order = under_test.order(0, 0)
    under_test.close()
    assert order.rollouts == (good,) and order.discarded == ((2, 4), (2, 6))
    alone, empty, beside = read_records(tmp_path / "events.jsonl")
    assert (alone["kind"], empty["kind"], beside["kind"]) == ("alarm", "empty", "alarm")
    told = f"1 of 2 rollouts are thrown away: token {SHAPE.vocab} is none of the teacher's"
    assert beside["message"].startswith(told)


def test_a_probe_goes_without_them(tmp_path: Path) -> None:
    good, bad = rollouts(4, 6)
    discarded = Discarded()
    source = Listed([[good, padded(bad)], [padded(bad)]])
    under_test = conductor(tmp_path, PREFIX, source, discarded=discarded)
    assert under_test.probe_order(2, 0).rollouts == (good,)
    assert under_test.probe_order(4, 0).rollouts == ()
    under_test.close()
    assert not discarded.seen()  # a probe's are no part of a step
