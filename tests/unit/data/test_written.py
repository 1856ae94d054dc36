"""Written answers as rollouts: order, cut, stop tokens, resume, and everything that is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.config import DataConfig, ModeConfig, Recipe, TrainConfig, WrittenConfig
from megatron_prefix.data.sources import ModeSource
from megatron_prefix.data.tokenizers import load_tokenizer
from megatron_prefix.data.written import WrittenSource, check_written
from megatron_prefix.tasks import sort_chain
from megatron_prefix.types import Rollout
from tests.refused import refusal_of

STOPS = (sort_chain.EOS_ID,)
STUDENT = sort_chain.model_folder("student_a")


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def problem_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": each.prompt, "answer": each.response, "ids": list(sort_chain.encode("ab|$c"))}
        for each in sort_chain.make_problems(count, 5)
    ]


def recipe(data: str, name: str = "off_policy", **written: str) -> Recipe:
    return Recipe(
        data=DataConfig(path=data, max_prompt_length=sort_chain.PROMPT_LENGTH),
        mode=ModeConfig(name=name, written=WrittenConfig(**written)),
        train=TrainConfig(steps=4, global_batch_size=6),
    )


def source(ours: Recipe) -> WrittenSource:
    return WrittenSource(ours, load_tokenizer(str(STUDENT)), STOPS)


def refusal(ours: Recipe) -> str:
    return refusal_of(check_written, ours, load_tokenizer(str(STUDENT)), STOPS)


def test_answers_are_cut_at_the_prefix_length_as_a_server_cuts(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", *problem_rows(6))
    (cut,) = source(recipe(path)).take(1, 9, 3)
    (whole,) = source(recipe(path)).take(1, 75, 3)
    assert len(cut.prefix_ids) == 9 and cut.finish_reason == "length"
    assert len(whole.prefix_ids) == 75 and whole.finish_reason == "stop"
    assert whole.prefix_ids[:9] == cut.prefix_ids
    assert whole.prefix_ids[-1] == sort_chain.EOS_ID  # the text's own, not one more
    assert (cut.written, cut.policy_version) == (True, 3)
    assert all(math.isnan(each) for each in cut.rollout_logprobs)


def test_a_text_is_ended_by_the_stop_token_and_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [{"prompt": "^a1>", "answer": "ab", "ids": [40, 41]}]
    path = write(tmp_path / "set.jsonl", *rows)
    (text,) = source(recipe(path)).take(1, 75, 0)
    (ids,) = source(recipe(path, answer_column="ids")).take(1, 75, 0)
    assert text.prefix_ids == (*sort_chain.encode("ab"), sort_chain.EOS_ID)
    assert text.finish_reason == "stop"
    assert ids.prefix_ids == (40, 41) and ids.finish_reason == "length"


def test_what_follows_a_stop_token_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", *problem_rows(1))
    (rollout,) = source(recipe(path, answer_column="ids")).take(1, 75, 0)
    assert rollout.prefix_ids == sort_chain.encode("ab|$")


def test_an_empty_text_is_the_stop_token_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", {"prompt": "^a1>", "answer": ""})
    (rollout,) = source(recipe(path)).take(1, 9, 0)
    assert rollout.prefix_ids == STOPS and rollout.finish_reason == "stop"


def test_the_order_is_the_seeds_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", *problem_rows(10))
    first = source(recipe(path))
    early, state = first.take(7, 9, 0), first.state_dict()
    late = first.take(7, 9, 0)
    again = source(recipe(path))
    assert [r.prompt_ids for r in again.take(7, 9, 0)] == [r.prompt_ids for r in early]
    resumed = source(recipe(path))
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert [r.prompt_ids for r in resumed.take(7, 9, 0)] == [r.prompt_ids for r in late]


def test_a_set_of_its_own_may_name_its_columns_otherwise(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", {"question": "^a1>", "solution": "b"})
    ours = recipe("", path=path, prompt_column="question", answer_column="solution")
    (rollout,) = source(ours).take(1, 9, 0)
    assert rollout.prompt_ids == sort_chain.encode("^a1>")


class Sampled:
    """Stands beside the written supply: numbered rollouts of a student."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, count: int, prefix_length: int, policy_version: int) -> list[Rollout]:
        self.taken += count
        ids = (3,) * prefix_length
        return [
            Rollout((1,), ids, (0.0,) * prefix_length, "length", policy_version, n)
            for n in range(count)
        ]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def test_mixed_batches_hold_both_and_resume_both(tmp_path: Path) -> None:
    path = write(tmp_path / "set.jsonl", *problem_rows(10))
    ours = recipe("", "mixed", path=path)
    ours = replace(ours, mode=replace(ours.mode, written_share=0.25))

    def mixed() -> ModeSource:
        return ModeSource(ours, {"sampled": Sampled(), "written": source(ours)})

    under_test = mixed()
    batches = [under_test.sample(step, 4, step) for step in range(2)]
    assert [len(batch) for batch in batches] == [6, 6]
    assert [sum(r.written for r in batch) for batch in batches] == [1, 2]
    state = json.loads(json.dumps(under_test.state_dict()))
    assert state["sampled"] == {"taken": 9}
    resumed = mixed()
    resumed.load_state_dict(state)
    ours_ids = [r.prompt_ids for r in under_test.sample(2, 4, 2)]
    assert [r.prompt_ids for r in resumed.sample(2, 4, 2)] == ours_ids


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "^>"}, "mode.written.answer_column=answer is not a column of"),
        ({"prompt": "^>", "answer": 7}, "row 1 of"),
        ({"prompt": "^>", "answer": [1, 46]}, "has id 46, and the tokenizer ends at 45"),
        ({"prompt": "^>", "answer": []}, "has no token; remove the row or give it an answer"),
        ({"prompt": "^>", "answer": ["a"]}, "neither a text nor token ids"),
    ],
    ids=["no column", "a number", "unknown id", "no token", "words"],
)
def test_answers_that_cannot_be_trained_on_are_refused_before_the_run(
    tmp_path: Path, row: dict[str, Any], words: str
) -> None:
    good = {"prompt": "^a1>", "answer": [3] if isinstance(row.get("answer"), list) else "b"}
    rows = [row] if "answer" not in row else [good, row]
    if row.get("answer") == 7:  # JSON lines have one type a column
        rows = [{"prompt": "^>", "answer": 6}, row]
        words = "row 0 of"
    path = write(tmp_path / "set.jsonl", *rows)
    assert words in refusal(recipe(path))


def test_an_empty_set_and_overlong_prompts_are_named(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.jsonl")
    assert "mode.written.path=" in refusal(recipe("", path=empty))
    long = write(tmp_path / "long.jsonl", {"prompt": "^" + "a1" * 20, "answer": "b"})
    assert "every prompt is longer than data.max_prompt_length=14" in refusal(recipe(long))
