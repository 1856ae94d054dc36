"""What one server fails to answer, another does, and no prompt ends with two rollouts or with none;
which servers the fleet lets be asked."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.addresses import take_lost_report, write_endpoints
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.collector import Collector
from megatron_prefix.rollout.fleet import Fleet
from megatron_prefix.rollout.protocol import (
    OtherWeights,
    ServerUnavailable,
    SglangError,
    UnexpectedAnswer,
)
from megatron_prefix.types import Prompt, Rollout
from tests.server.faulty_peer import HANG_UP, FaultyPeer, faulty_peer

PROMPTS = [Prompt(place, place, (4, 5 + place)) for place in range(4)]
CONFIG = RolloutConfig(hang_timeout_s=0.4, server_restarts=2, start_timeout_s=60.0)


def generation(version: int) -> dict[str, Any]:
    logprobs = [[-0.5, 8, None], [-0.25, 9, None]]
    meta = {"finish_reason": {"type": "length"}, "weight_version": f"v{version}"}
    return {"output_ids": [8, 9], "meta_info": {**meta, "output_token_logprobs": logprobs}}


@contextmanager
def good_peer(version: int = 3) -> Iterator[FaultyPeer]:
    """Answers as many generations as it was asked for, one of our requests at a time."""
    with faulty_peer([(200, "")]) as peer:
        peer.answers = Generations(peer, version)  # type: ignore[assignment]
        peer.fixed |= {"/health": (200, ""), "/abort_request": (200, "")}
        peer.fixed["/model_info"] = (200, json.dumps({"weight_version": f"v{version}"}))
        yield peer


class Generations:
    """Looks like the peer's list of answers, and has one for each request."""

    def __init__(self, peer: FaultyPeer, version: int) -> None:
        self._peer, self._version = peer, version

    def __len__(self) -> int:
        return 1

    def __getitem__(self, _: int) -> tuple[int, str]:
        prompts = self._peer.requests[-1][1]["input_ids"]
        return 200, json.dumps([generation(self._version)] * len(prompts))


def endpoint(peer: FaultyPeer, **changes: Any) -> Endpoint:
    return Endpoint(**{"url": peer.url, "retries": 1, "first_delay_s": 0.01} | changes)


def asked(peer: FaultyPeer) -> list[list[int]]:
    return [ids for path, body in peer.requests if path == "/generate" for ids in body["input_ids"]]


def collect(fleet: Fleet, peers: list[FaultyPeer], wanted: int = 0) -> list[Rollout]:
    endpoints = [endpoint(peer) for peer in peers]
    with Collector(endpoints, CONFIG, (), roster=fleet) as collector:
        return collector.collect(PROMPTS, max_new_tokens=2, policy_version=3, wanted=wanted)


FAULTS = {
    "500": (500, "out of memory"),
    "hangs up": (HANG_UP, ""),
    "garbage": (200, "<html>gateway</html>"),
    "too few": (200, "[]"),
    "old weights": (200, json.dumps([generation(0)] * 2)),
    "newer weights": (200, json.dumps([generation(9)] * 2)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_server_answers_and_each_prompt_has_one_rollout(fault: str) -> None:
    with faulty_peer([FAULTS[fault]]) as bad, good_peer() as good:
        fleet = Fleet([endpoint(bad), endpoint(good)], CONFIG)
        fleet.took(fleet.members, 3)
        rollouts = collect(fleet, [bad, good])
        assert [rollout.prompt_index for rollout in rollouts] == [0, 1, 2, 3]
        assert {rollout.policy_version for rollout in rollouts} == {3}
        assert fleet.usable() == [good.url]
        before = len(bad.requests)
        collect(fleet, [bad, good])
        assert len(bad.requests) == before, "it is asked no more"
        fleet.close()


def test_with_a_quorum_too_each_prompt_has_one_rollout() -> None:
    with faulty_peer([FAULTS["garbage"]]) as bad, good_peer() as good:
        bad.fixed["/abort_request"] = (200, "")
        fleet = Fleet([endpoint(bad), endpoint(good)], CONFIG)
        rollouts = collect(fleet, [bad, good], wanted=3)
        assert len({rollout.prompt_index for rollout in rollouts}) == len(rollouts) == 3
        assert fleet.usable() == [good.url]
        fleet.close()


def test_a_server_that_hangs_is_found_by_its_health_and_its_late_answer_is_not_taken() -> None:
    with faulty_peer([(200, json.dumps([generation(3)] * 2))], delay_s=4.0) as slow:
        slow.fixed["/health"] = (503, "")
        with good_peer() as good:
            fleet = Fleet([endpoint(slow), endpoint(good)], CONFIG)
            rollouts = collect(fleet, [slow, good])
            assert sorted(asked(good)) == [list(prompt.input_ids) for prompt in PROMPTS]
        assert [rollout.prompt_index for rollout in rollouts] == [0, 1, 2, 3]
        assert fleet.usable() == [good.url]
        fleet.close()


def test_a_slow_server_that_is_well_is_waited_for() -> None:
    with faulty_peer([(200, json.dumps([generation(3)] * 4))], delay_s=1.5) as slow:
        slow.fixed["/health"] = (200, "")
        told: list[float] = []
        fleet = Fleet([endpoint(slow)], CONFIG, waiting=lambda: told.append(time.monotonic()))
        assert len(collect(fleet, [slow])) == 4
        assert fleet.usable() == [slow.url]
        assert told, "that an answer is out"
        fleet.close()


def test_where_none_is_left_the_last_ones_words_are_raised() -> None:
    with faulty_peer([FAULTS["500"]]) as one, faulty_peer([FAULTS["garbage"]]) as two:
        fleet = Fleet([endpoint(one), endpoint(two)], CONFIG)
        with pytest.raises((ServerUnavailable, UnexpectedAnswer), match="out of memory|not JSON"):
            collect(fleet, [one, two])
        assert fleet.usable() == []
        with pytest.raises(ServerUnavailable, match="no SGLang server is left to ask"):
            collect(fleet, [one, two])
        fleet.close()


def test_a_server_with_other_weights_is_told_apart_by_its_version() -> None:
    told: list[str] = []
    with good_peer(version=0) as peer:
        fleet = Fleet([endpoint(peer)], CONFIG, told.append)
        assert not fleet.in_step(3), "it never took any"
        fleet.took(fleet.members, 3)
        assert not fleet.in_step(3)
        (words,) = told
        assert f"{peer.url} holds weights v0, not v3: it gets them anew" in words
        fleet.took(fleet.members, 0)
        assert fleet.in_step(0)
        assert not fleet.in_step(4), "it holds what it was given, and the trainer has gone on"
        assert told == [words] and fleet.in_step(0)
        fleet.close()


def test_a_lost_server_of_somebody_elses_is_back_when_it_is_well() -> None:
    with good_peer() as peer:
        fleet = Fleet([endpoint(peer)], CONFIG)
        fleet.took(fleet.members, 3)
        fleet.lose(peer.url, SglangError("it was rude"))
        peer.fixed["/health"] = (503, "")
        assert not fleet.in_step(3) and fleet.usable() == []
        peer.fixed["/health"] = (200, "")
        assert not fleet.in_step(3), "back, and its weights are anybody's guess"
        assert fleet.usable() == [peer.url]
        fleet.took(fleet.members, 3)
        assert fleet.in_step(3)
        fleet.close()


def test_a_lost_server_of_ours_is_back_after_a_new_start_only(tmp_path: Path) -> None:
    file = tmp_path / "endpoints.json"
    with good_peer() as peer:
        first = endpoint(peer, source=str(file))
        write_endpoints(file, [first])
        fleet = Fleet([first], CONFIG)
        fleet.lose(peer.url, SglangError("it was rude"))
        assert not fleet.in_step(3) and fleet.usable() == []
        assert take_lost_report(file, first) == "it was rude"
        assert take_lost_report(file, first) == "", "told once"
        second = endpoint(peer, source=str(file), start=1)
        write_endpoints(file, [second])
        fleet.in_step(3)
        assert fleet.members[0].endpoint == second
        fleet.close()


def test_a_server_that_only_holds_other_weights_needs_no_new_start(tmp_path: Path) -> None:
    with good_peer(version=0) as peer:
        fleet = Fleet([endpoint(peer, source=str(tmp_path / "endpoints.json"))], CONFIG)
        fleet.took(fleet.members, 3)
        with pytest.raises(OtherWeights, match="version 0, though it had been given 3"):
            collect(fleet, [peer])
        assert fleet.usable() == []
        assert list(tmp_path.iterdir()) == [], "nobody is asked to start it again"
        assert not fleet.in_step(3) and fleet.usable() == [peer.url]
        fleet.close()


def test_a_report_of_an_earlier_start_is_not_acted_upon(tmp_path: Path) -> None:
    file = tmp_path / "endpoints.json"
    with good_peer() as peer:
        first = endpoint(peer, source=str(file))
        fleet = Fleet([first], CONFIG)
        fleet.lose(peer.url, SglangError("it was rude"))
        fleet.close()
        assert take_lost_report(file, endpoint(peer, source=str(file), start=1)) == ""
        assert list(tmp_path.iterdir()) == []


def test_faults_in_a_row_are_bounded() -> None:
    with good_peer() as peer:
        fleet = Fleet([endpoint(peer)], CONFIG)
        for _ in range(CONFIG.server_restarts):
            fleet.lose(peer.url, SglangError("it was rude"))
            fleet.expect()
            fleet.in_step(3)
            assert fleet.usable() == [peer.url]
        fleet.lose(peer.url, SglangError("it was rude again"))
        fleet.in_step(3)
        assert fleet.usable() == []
        with pytest.raises(ServerUnavailable, match="no SGLang server is left: it was rude again"):
            fleet.expect()
        fleet.close()


def test_doubts_in_a_row_are_bounded() -> None:
    with good_peer() as peer:
        fleet = Fleet([endpoint(peer)], CONFIG)
        fleet.took(fleet.members, 3)
        for _ in range(CONFIG.server_restarts):
            fleet.doubt(SglangError("weights differ"))
            assert not fleet.in_step(3) and fleet.usable() == [peer.url]
        with pytest.raises(SglangError, match="weights differ"):
            fleet.doubt(SglangError("weights differ"))
        fleet.close()


def test_a_server_that_was_silent_for_long_enough_is_not_waited_for_again() -> None:
    told: list[str] = []
    with faulty_peer([(200, "")], delay_s=8.0) as silent, good_peer() as good, good_peer() as late:
        fleet = Fleet([endpoint(peer) for peer in (silent, good, late)], CONFIG, told.append)
        silence = {silent.url: CONFIG.hang_timeout_s, late.url: CONFIG.hang_timeout_s / 2}
        fleet.doubt(SglangError("it hangs"), silence)
        assert fleet.usable() == [good.url, late.url]
        assert silent.requests == [] and ("/health", None) in late.requests
        assert f"lost the SGLang server at {silent.url}: it hangs" in told
        fleet.close()
