"""Servers that only score, asked from a thread: what becomes of those that fail. No SGLang here; a
real one is in ``test_server_teacher.py``."""

import base64
import contextlib
import json
import math
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.addresses import take_lost_report, write_endpoints
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.fleet import UNKNOWN, Fleet
from megatron_prefix.rollout.protocol import ServerUnavailable, UnexpectedAnswer
from megatron_prefix.rollout.scorer import Scorer
from megatron_prefix.rollout.scoring import Passage
from tests.server.faulty_peer import HANG_UP, faulty_peer
from tests.server.forwarder import forwarder

LIMITS = RolloutConfig(start_timeout_s=60.0, request_timeout_s=60.0, hang_timeout_s=60.0)
PASSAGE = Passage((3, 9, 4, 7, 5), 2)


def canned(passage: Passage, top_k: int) -> str:
    """An answer of the right form: ids 0, 1, ..., all alike."""
    logprobs = np.full((passage.scored, top_k), -math.log(2 * top_k), np.float32)
    ids = np.tile(np.arange(top_k, dtype=np.int32), (passage.scored, 1))
    named = {"val": logprobs, "idx": ids}
    meta: dict[str, object] = {
        "finish_reason": {"type": "length"},
        "input_top_logprobs_shape": list(ids.shape),
        "input_top_logprobs_null_prefix": 1,
    }
    for name, array in named.items():
        field = f"input_top_logprobs_{name}_flat_b64"
        meta |= {field: base64.b64encode(array.tobytes()).decode()}
        meta |= {f"{field}_dtype": str(array.dtype)}
    return json.dumps([{"meta_info": meta}])


INFO = json.dumps({"architectures": ["LlamaForCausalLM"], "model_path": "/served/llama"})


def asked_of(url: str, **limits: float) -> Scorer:
    settings = replace(LIMITS, **{"start_timeout_s": 2.0, "request_timeout_s": 2.0, **limits})
    endpoint = Endpoint(url, timeout_s=settings.request_timeout_s, retries=1, first_delay_s=0.05)
    return Scorer([endpoint], settings, 3, "teacher.server")


def test_a_server_that_hangs_up_is_asked_again_once_it_is_back() -> None:
    answers = [(HANG_UP, "")] * 3 + [(200, canned(PASSAGE, 3))]
    with faulty_peer(answers) as peer:
        peer.fixed = {"/model_info": (200, INFO), "/health": (200, "")}
        scorer = asked_of(peer.url, start_timeout_s=20.0)
        (rows,) = scorer.submit([PASSAGE]).result(timeout=20)
        scorer.close()
    assert rows.ids.tolist() == [[0, 1, 2]] * 3
    assert len([path for path, _ in peer.requests if path == "/generate"]) == 4


def test_a_server_of_ours_is_asked_again_after_its_new_start(tmp_path: Path) -> None:
    """Its supervisor is told that it was lost, and says in its file that it started it again."""
    source = tmp_path / "teacher.json"
    with faulty_peer([(HANG_UP, ""), (200, canned(PASSAGE, 3))]) as peer:
        peer.fixed = {"/model_info": (200, INFO), "/health": (200, "")}
        endpoint = Endpoint(peer.url, retries=0, source=str(source))
        write_endpoints(source, [endpoint])
        scorer = Scorer([endpoint], LIMITS, 3, "teacher.server")
        asked = scorer.submit([PASSAGE])
        with pytest.raises(TimeoutError):
            asked.result(timeout=1.5)  # it answers, but as the start that was lost
        assert peer.url in take_lost_report(source, endpoint)
        write_endpoints(source, [replace(endpoint, start=1)])
        (rows,) = asked.result(timeout=20)
        scorer.close()
    assert rows.ids.shape == (3, 3)


def test_a_server_that_stays_away_is_one_error_within_its_time() -> None:
    with faulty_peer([(HANG_UP, "")]) as peer:
        scorer = asked_of(peer.url)
        with pytest.raises(ServerUnavailable) as error:
            scorer.submit([PASSAGE]).result(timeout=20)
        scorer.close()
    assert "no server of teacher.server answered for teacher.server.start_timeout_s=2" in str(
        error.value
    )
    assert peer.url in str(error.value) and "\n" not in str(error.value)


def test_a_server_that_is_too_slow_names_the_teachers_setting() -> None:
    with faulty_peer([(200, canned(PASSAGE, 3))], delay_s=1.0) as peer:
        peer.fixed = {"/model_info": (HANG_UP, "")}
        settings = replace(LIMITS, start_timeout_s=0.5)
        slow = Endpoint(peer.url, timeout_s=0.2, retries=0, settings="teacher.server")
        scorer = Scorer([slow], settings, 3, "teacher.server")
        with pytest.raises(ServerUnavailable, match="raise teacher.server.request_timeout_s"):
            scorer.submit([PASSAGE]).result(timeout=20)
        scorer.close()


def test_another_server_takes_over_what_one_does_not_answer() -> None:
    passages = [PASSAGE] * 40
    part = json.loads(canned(PASSAGE, 3))
    with faulty_peer([(HANG_UP, "")]) as bad, faulty_peer([(200, "")]) as well:
        # Requests hold 16 passages, the last one 8.
        well.answers = [(200, json.dumps(part * 16))] * 2 + [(200, json.dumps(part * 8))]
        for peer in (bad, well):
            peer.fixed = {"/model_info": (200, INFO), "/health": (HANG_UP, "")}
        endpoints = [Endpoint(p.url, retries=0) for p in (bad, well)]
        scorer = Scorer(endpoints, LIMITS, 3, "teacher.server")
        first = scorer.submit(passages[:16]).result(timeout=20)
        rest = scorer.submit(passages[:16]).result(timeout=20)
        scorer.close()
    assert len(first) == len(rest) == 16
    assert [len(body["input_ids"]) for _, body in well.requests if body] == [16, 16]


def test_servers_that_are_back_are_looked_at_side_by_side() -> None:
    """Each answers once both are asked: one after another would find neither."""
    meet = threading.Barrier(2, timeout=20)

    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(faulty_peer([(200, "")]))
        peer.fixed = {"/model_info": (200, INFO)}
        between = [stack.enter_context(forwarder(peer.url)) for _ in range(2)]
        fleet = Fleet([Endpoint(each.url, retries=0) for each in between], LIMITS)
        stack.callback(fleet.close)
        for each in between:
            fleet.lose(each.url, ServerUnavailable("gone"))
            each.before["/health"] = meet.wait
        assert fleet.in_step(UNKNOWN)
        assert fleet.usable() == [each.url for each in between]


def test_scores_that_cannot_be_used_are_not_asked_for_again() -> None:
    with faulty_peer([(200, "[]")]) as peer:
        scorer = asked_of(peer.url)
        with pytest.raises(UnexpectedAnswer, match="no list of 1 scores"):
            scorer.submit([PASSAGE]).result(timeout=20)
        scorer.close()
    assert len(peer.requests) == 1
