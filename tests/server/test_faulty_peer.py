"""Answers that no working server gives: each becomes an error that names server and fault."""

import json
from typing import Any

import pytest

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.client import Endpoint, SglangClient
from megatron_prefix.rollout.collector import Collector
from megatron_prefix.rollout.discarded import Discarded
from megatron_prefix.rollout.protocol import (
    NoRollouts,
    RequestRefused,
    Sampling,
    ServerUnavailable,
    UnexpectedAnswer,
)
from megatron_prefix.rollout.server import free_port
from megatron_prefix.types import Prompt
from tests.server.faulty_peer import HANG_UP, FaultyPeer, faulty_peer

META = {
    "finish_reason": {"type": "length", "length": 2},
    "weight_version": "v3",
    "output_token_logprobs": [[-0.5, 8, None], [-0.25, 9, None]],
}
GOOD = {"output_ids": [8, 9], "meta_info": META}
PROMPT = Prompt(0, 0, (4, 5))


def entry(**changes: Any) -> dict[str, Any]:
    """A generation that differs from a good one in ``output_ids`` or in parts of its meta_info."""
    ids = changes.pop("output_ids", GOOD["output_ids"])
    return {"output_ids": ids, "meta_info": META | changes}


def endpoint(peer: FaultyPeer, **changes: Any) -> Endpoint:
    return Endpoint(**{"url": peer.url, "retries": 2, "first_delay_s": 0.01} | changes)


def collect(peer: FaultyPeer, **changes: Any) -> Any:
    with Collector([endpoint(peer, **changes)], RolloutConfig(), ()) as collector:
        return collector.collect([PROMPT], max_new_tokens=2, policy_version=3)


def generate(peer: FaultyPeer, **changes: Any) -> Any:
    with SglangClient(endpoint(peer, **changes)) as client:
        return client.generate([PROMPT.input_ids], Sampling(2))


BOTH = pytest.mark.parametrize("ask", [generate, collect])


@BOTH
@pytest.mark.parametrize("fault", [(500, "boom"), (503, ""), (HANG_UP, "")])
def test_a_passing_fault_is_tried_again(ask: Any, fault: tuple[int, str]) -> None:
    with faulty_peer([fault, fault, (200, json.dumps([GOOD]))]) as peer:
        answers = ask(peer)
    assert len(answers) == 1
    assert len(peer.requests) == 3


@BOTH
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ((500, "out of memory"), "answered 500: out of memory"),
        ((HANG_UP, ""), "could not be reach"),
    ],
)
def test_a_lasting_fault_ends_after_the_retries(
    ask: Any, fault: tuple[int, str], words: str
) -> None:
    with (
        faulty_peer([fault]) as peer,
        pytest.raises(ServerUnavailable, match=rf"{peer.url}/generate {words}.*after 3 attempts"),
    ):
        ask(peer)
    assert len(peer.requests) == 3


@BOTH
def test_nothing_listens(ask: Any) -> None:
    nobody = FaultyPeer(f"http://127.0.0.1:{free_port()}", [])
    with pytest.raises(ServerUnavailable, match=rf"{nobody.url}/generate could not be reached"):
        ask(nobody)


@BOTH
def test_an_answer_that_takes_too_long_is_not_asked_for_again(ask: Any) -> None:
    with (
        faulty_peer([(200, json.dumps([GOOD]))], delay_s=1.0) as peer,
        pytest.raises(ServerUnavailable, match=r"no answer within 0.1 s; raise rollout.request_t"),
    ):
        ask(peer, timeout_s=0.1)
    assert len(peer.requests) == 1


@BOTH
@pytest.mark.parametrize(
    "body",
    [
        '{"error": {"message": "prompt too long"}}',
        '{"detail": "prompt too long"}',
        "prompt  too\nlong",
    ],
)
def test_a_refusal_is_final_and_quotes_the_server(ask: Any, body: str) -> None:
    with (
        faulty_peer([(400, body)]) as peer,
        pytest.raises(RequestRefused, match=r"/generate refused .* 400: prompt too long$"),
    ):
        ask(peer)
    assert len(peer.requests) == 1


@BOTH
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("<html>gateway</html>", "not JSON: <html>gateway</html>"),
        ("[]", "answered 0 generations to 1 prompts"),
        (json.dumps([GOOD, GOOD]), "answered 2 generations to 1 prompts"),
        (json.dumps(GOOD), "answered no list of generations to 1 prompts"),
        ("", "answered no list of generations to 1 prompts"),
        ('[{"text": "hello"}]', "KeyError: 'meta_info'"),
        ("[7]", "TypeError"),
        (json.dumps([entry(output_ids=None)]), "TypeError"),
        (json.dumps([entry(output_token_logprobs=None)]), "2 tokens but log-probabilities of 0"),
        (json.dumps([entry(output_ids=[8, 7])]), "of 2, or of others"),
        (json.dumps([entry(output_token_logprobs=[[None, 8, None]])]), "TypeError"),
        ('[{"output_ids": [8], "meta_info": {"output_token_logprobs": [[NaN, 8]]}}]', "nan"),
        (json.dumps([entry(finish_reason=None)]), "TypeError"),
        (json.dumps([entry(finish_reason={"type": "bored"})]), "finish_reason 'bored'"),
        (json.dumps([entry(weight_version="default")]), "'default' is not v0, v1"),
    ],
)
def test_an_answer_without_what_was_promised_is_quoted(ask: Any, body: str, words: str) -> None:
    with faulty_peer([(200, body)]) as peer, pytest.raises(UnexpectedAnswer) as caught:
        ask(peer)
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{peer.url}/generate answered")
    assert "\n" not in str(caught.value)


def test_a_long_answer_is_quoted_in_part() -> None:
    with (
        faulty_peer([(200, "x" * 5000)]) as peer,
        pytest.raises(UnexpectedAnswer, match=r"x{300}\.\.\. \(5000 characters\)$"),
    ):
        generate(peer)


def test_the_version_is_that_of_the_last_token() -> None:
    spans = [{"version": "v1", "start": 0, "end": 1}, {"version": "v2", "start": 1, "end": 2}]
    with faulty_peer([(200, json.dumps([entry(weight_versions=spans)]))]) as peer:
        (rollout,) = collect(peer)
    assert rollout.policy_version == 2


def test_everything_aborted_is_an_error() -> None:
    aborted = entry(output_ids=[], output_token_logprobs=[], finish_reason={"type": "abort"})
    with (
        faulty_peer([(200, json.dumps([aborted]))]) as peer,
        pytest.raises(NoRollouts, match=r"none of 1 rollouts is usable: all were aborted"),
    ):
        collect(peer)


def test_each_attempt_has_a_request_id_of_its_own() -> None:
    """A server refuses an id that it still works on, and aborts all that begin with one."""
    prompts = [Prompt(place, place, (4, 5)) for place in range(2)]
    answers, surplus = [(500, "")] + [(200, json.dumps([GOOD]))] * 3, Discarded()
    with (
        faulty_peer(answers) as peer,
        Collector([endpoint(peer)], RolloutConfig(), (), discarded=surplus) as collector,
    ):
        rollouts = collector.collect(prompts, max_new_tokens=2, policy_version=3, wanted=1)
    ids = [body["rid"][0] for path, body in peer.requests if path == "/generate"]
    assert len(ids) == len(set(ids)) == 3
    assert len({len(identifier) for identifier in ids}) == 1
    assert [rollout.prompt_index for rollout in rollouts] == [0]
    assert surplus.take() == ((2, 2),)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_faulty_server_of_two_ends_the_collection(wanted: int) -> None:
    prompts = [Prompt(place, place, (4, 5)) for place in range(2)]
    with (
        faulty_peer([(200, json.dumps([GOOD]))], delay_s=0.5) as slow,
        faulty_peer([(400, "no such model")]) as broken,
        Collector([endpoint(slow), endpoint(broken)], RolloutConfig(), ()) as collector,
        pytest.raises(RequestRefused, match=rf"{broken.url}/generate refused .*no such model"),
    ):
        collector.collect(prompts, max_new_tokens=2, policy_version=3, wanted=wanted)


def test_a_cache_that_cannot_be_flushed() -> None:
    with (
        faulty_peer([(400, "Flush cache failed.\n")]) as peer,
        SglangClient(endpoint(peer)) as client,
        pytest.raises(RequestRefused, match=r"with 400: Flush cache failed\.$"),
    ):
        client.flush_cache()


@pytest.mark.parametrize("answer", ["[]", '{"ranks": null}', '{"ranks": [{"checksums": {}}]}'])
def test_checksums_that_are_none(answer: str) -> None:
    with (
        faulty_peer([(200, answer)]) as peer,
        SglangClient(endpoint(peer)) as client,
        pytest.raises(UnexpectedAnswer, match=r"/weights_checker answered"),
    ):
        client.weight_checksums()


def test_a_command_that_did_not_succeed_is_an_error_and_sent_once() -> None:
    with faulty_peer([(200, '{"success": false, "message": "busy"}')]) as peer:
        with SglangClient(endpoint(peer)) as client, pytest.raises(RequestRefused, match="busy"):
            client.end_weight_update()
        peer.answers[:] = [(500, "crashed")]
        with SglangClient(endpoint(peer)) as client, pytest.raises(ServerUnavailable):
            client.end_weight_update()
    assert len(peer.requests) == 2
