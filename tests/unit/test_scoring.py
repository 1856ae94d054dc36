"""What a scoring server is asked, what is taken from its answer, and which position is whose."""

import base64
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_prefix.batch import as_teacher_reads, pack, passages_of, plan_microbatches
from megatron_prefix.rollout.protocol import UnexpectedAnswer
from megatron_prefix.rollout.scoring import (
    Passage,
    TopRows,
    Vocabulary,
    common_top_k,
    parse_scores,
    score_body,
)
from megatron_prefix.types import Rollout

URL = "http://peer"
PASSAGES = [Passage((5, 6, 7, 8, 9), 3), Passage((1, 2, 3), 1)]


def entry(logprobs: Any, ids: Any, **more: Any) -> dict[str, Any]:
    """As SGLang 0.5.23 answers it."""
    values, names = np.asarray(logprobs, np.float32), np.asarray(ids, np.int32)
    meta = {
        "finish_reason": {"type": "length", "length": 0},
        "input_top_logprobs_val_flat_b64": base64.b64encode(values.tobytes()).decode(),
        "input_top_logprobs_idx_flat_b64": base64.b64encode(names.tobytes()).decode(),
        "input_top_logprobs_val_flat_b64_dtype": "float32",
        "input_top_logprobs_idx_flat_b64_dtype": "int32",
        "input_top_logprobs_shape": list(values.shape),
        "input_top_logprobs_null_prefix": 1,
    }
    return {"output_ids": [], "meta_info": meta | more}


def good() -> list[dict[str, Any]]:
    row = np.log(np.array([0.5, 0.25]))
    return [entry([row, row], [[3, 4], [4, 3]]), entry([row, row], [[1, 2], [7, 8]])]


def test_a_request_names_the_position_before_the_first_scored_token() -> None:
    body = score_body(PASSAGES, 7)
    assert body["input_ids"] == [[5, 6, 7, 8, 9], [1, 2, 3]]
    assert body["logprob_start_len"] == [2, 0]
    assert body["top_logprobs_num"] == 7
    assert body["sampling_params"]["max_new_tokens"] == 0
    assert [passage.scored for passage in PASSAGES] == [2, 2]


def test_rows_are_the_servers() -> None:
    first, second = parse_scores(good(), PASSAGES, 2, URL)
    assert first.ids.tolist() == [[3, 4], [4, 3]]
    assert second.ids.tolist() == [[1, 2], [7, 8]]
    np.testing.assert_allclose(np.exp(first.logprobs), [[0.5, 0.25]] * 2, rtol=1e-6)


def test_a_hair_above_certainty_is_certainty() -> None:
    answer = [entry([[1e-6, -9.0], [-1e-3, -8.0]], [[1, 2], [1, 2]]), good()[1]]
    assert parse_scores(answer, PASSAGES, 2, URL)[0].logprobs[0, 0] == 0.0


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ({}, "KeyError: 'meta_info'"),
        (None, "TypeError"),
        (entry([[-1.0, -2.0]], [[1, 2]]), "[1, 2] log-probabilities behind 1 empty"),
        (entry([[-1.0], [-2.0]], [[1], [1]]), "not [2, 2] behind 1"),
        (entry([[-1.0, np.nan], [-1, -2]], [[1, 2], [1, 2]]), "scored token 0 has"),
        (
            entry([[-1.0, -2], [-1, -np.inf]], [[1, 2], [1, 2]]),
            "scored token 1 has log-probability",
        ),
        (entry([[0.5, -2], [-1, -2]], [[1, 2], [1, 2]]), "log-probability 0.5 of token 1"),
        (entry([[-1.0, -2], [-1, -2]], [[1, -7], [1, 2]]), "of token -7"),
        (good()[0] | {"meta_info": {"finish_reason": {"type": "abort"}}}, "it was aborted"),
    ],
)
def test_an_answer_that_lacks_something_is_quoted(first: Any, words: str) -> None:
    with pytest.raises(UnexpectedAnswer) as error:
        parse_scores([first, good()[1]], PASSAGES, 2, URL)
    assert words in str(error.value)
    assert URL in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_top_logprobs_val_flat_b64_dtype", "float64"),
        ("input_top_logprobs_idx_flat_b64_dtype", "int64"),
        ("input_top_logprobs_null_prefix", 0),
        ("input_top_logprobs_val_flat_b64", "???"),
        ("input_top_logprobs_val_flat_b64", base64.b64encode(b"12345678").decode()),
    ],
)
def test_other_encodings_are_not_guessed_at(field: str, value: Any) -> None:
    answer = good()
    answer[0]["meta_info"][field] = value
    with pytest.raises(UnexpectedAnswer):
        parse_scores(answer, PASSAGES, 2, URL)


@pytest.mark.parametrize("answer", [{}, [], None, "no", good()[:1], json.loads("[1, 2]")])
def test_another_number_of_answers_is_refused(answer: Any) -> None:
    with pytest.raises(UnexpectedAnswer):
        parse_scores(answer, PASSAGES, 2, URL)


def a_rollout(prompt: tuple[int, ...], prefix: tuple[int, ...], **more: Any) -> Rollout:
    return Rollout(prompt, prefix, (0.0,) * len(prefix), "length", 0, 0, **more)


@pytest.mark.parametrize("loss_start", [0, 1, 2])
def test_scored_tokens_are_the_labels_of_the_prefix_positions(loss_start: int) -> None:
    """In the order of ``pack``, whatever a window leaves out and whatever the teacher reads."""
    rollouts = [
        a_rollout((3, 4, 5), (6, 7, 8, 9)),
        a_rollout((10,), (11,), teacher_prompt_ids=(20, 21)),
        a_rollout((12, 13), (14, 15), teacher_prompt_ids=(22,)),
        a_rollout((16, 17), (18, 19, 30)),
    ]
    plan = plan_microbatches(rollouts, 2, multiple=4, loss_start=loss_start)
    theirs, their_plan = as_teacher_reads(rollouts, plan)
    total = 0
    for m in range(len(plan)):
        batch = pack(rollouts, plan, m, torch.device("cpu"))
        found = passages_of(theirs, their_plan, m)
        scored = [token for each in found for token in each.ids[each.first :]]
        assert scored == batch.labels.tolist()
        assert all(each.scored > 0 and each.first >= 1 for each in found)
        total += len(scored)
    assert total == plan.loss_tokens


def dense(seed: int, rows: int, vocabulary: int) -> np.ndarray:
    logits = 2 * np.random.default_rng(seed).standard_normal((rows, vocabulary))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def top(logprobs: np.ndarray, k: int) -> TopRows:
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    named = np.take_along_axis(logprobs, ids, 1).astype(np.float32)
    return TopRows(ids.astype(np.int32), named)


def test_rows_of_one_vocabulary_stay_as_they_are() -> None:
    parts = [top(dense(seed, 3, 20), 5) for seed in (0, 1)]
    found = common_top_k(parts, Vocabulary(20, 20), 5)
    assert found.ids.tolist() == [*parts[0].ids.tolist(), *parts[1].ids.tolist()]
    assert np.array_equal(found.logprobs, np.concatenate([part.logprobs for part in parts]))


def test_padding_of_the_teachers_is_taken_out_and_its_mass_shared_out() -> None:
    """As the loss over the common vocabulary does, which cuts the logits off there."""
    whole, vocabulary = dense(2, 50, 24), Vocabulary(24, 20)
    cut = whole[:, :20] - np.log(np.exp(whole[:, :20]).sum(1, keepdims=True))
    found = common_top_k([top(whole, 24)], vocabulary, 6)
    wanted = top(cut, 6)
    assert found.ids.tolist() == wanted.ids.tolist()
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-5)


def test_rows_with_fewer_common_tokens_shorten_all() -> None:
    ids = np.array([[0, 1, 2, 3], [0, 9, 8, 3]], np.int32)
    rows = TopRows(ids, np.log(np.full((2, 4), 0.2, np.float32)))
    found = common_top_k([rows], Vocabulary(10, 5), 3)
    assert found.ids.tolist() == [[0, 1], [0, 3]]
    np.testing.assert_allclose(np.exp(found.logprobs), [[0.2, 0.2], [1 / 3, 1 / 3]], rtol=1e-6)
    nothing = replace(rows, ids=ids + 5)
    with pytest.raises(ValueError, match="position 0 are above 5, the ids that the student has"):
        common_top_k([nothing], Vocabulary(10, 5), 3)


def test_exchanged_stop_tokens_change_places() -> None:
    rows = TopRows(np.array([[2, 7, 1]], np.int32), np.log(np.float32([[0.5, 0.3, 0.1]])))
    found = common_top_k([rows], Vocabulary(9, 9, {7: 2}), 3)
    assert found.ids.tolist() == [[7, 2, 1]]


def test_never_more_is_asked_for_than_the_teacher_has() -> None:
    assert Vocabulary(46, 46).asked(45) == 45
    assert Vocabulary(48, 46).asked(45) == 47
    assert Vocabulary(152_064, 151_936).asked(64) == 80
    assert Vocabulary(50, 20).asked(49) == 50


def test_a_token_that_the_teacher_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="token 9 of a rollout is none of the teacher's 9"):
        Vocabulary(9, 9).check(PASSAGES)
    Vocabulary(10, 9).check(PASSAGES)
