"""A teacher's answers, written by a real server: kept, resumed, sorted, and trained on as ids."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_prefix.config import (
    DataConfig,
    ModeConfig,
    ModelConfig,
    Recipe,
    TrainConfig,
    WrittenConfig,
)
from megatron_prefix.data.tokenizers import load_tokenizer
from megatron_prefix.data.write_answers import Writing, write_answers
from megatron_prefix.data.written import WrittenSource
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.server import Server
from megatron_prefix.tasks import sort_chain

PROMPTS, LIMIT = 5, 6


@pytest.fixture
def writing(model_folder: Path, tmp_path: Path) -> Writing:
    """Greedy answers of the server's model, with a tokenizer of the model's first 46 ids."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name in ("config.json", "generation_config.json"):
        shutil.copy(model_folder / name, teacher / name)
    sort_chain.write_tokenizer(teacher)
    problems = sort_chain.make_problems(PROMPTS, 3)
    rows = [{"prompt": each.prompt} for each in problems] + [{"prompt": "^" + "a1" * 20}]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe(
        teacher=ModelConfig(hf_path=str(teacher)),
        data=DataConfig(path=str(data), max_prompt_length=sort_chain.PROMPT_LENGTH),
    )
    return Writing(recipe, tmp_path / "out" / "answers.jsonl", 0, 1, LIMIT, 0.0)


class Serving:
    """Hands out the session's server, and counts how often it was wanted."""

    def __init__(self, server: Server) -> None:
        self._server, self.asked = server, 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[list[Endpoint]]:
        self.asked += 1
        yield [self._server.endpoint]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_answers_are_written_in_the_data_sets_order_and_feed_a_run(
    writing: Writing, server: Server, original_weights: None
) -> None:
    serving = Serving(server)
    done = write_answers(writing, serving, Console(quiet=True))
    records = lines(writing.output)
    assert [record["row"] for record in records] == list(range(PROMPTS))
    assert (done.answers, done.dropped, done.empty) == (PROMPTS, 1, 0)
    assert done.cut == sum(record["finish_reason"] == "length" for record in records)
    assert done.tokens == sum(len(record["answer_ids"]) for record in records)
    assert not writing.partial.exists()
    with pytest.raises(ValueError, match="is there already"):
        writing.check()
    # Trained on as they were sampled. Ids that the small tokenizer lacks stay out of this.
    stops = (2,)
    kept = [record for record in records if max(record["answer_ids"]) < len(sort_chain.SYMBOLS)]
    rows = kept or [{**records[0], "answer_ids": [5]}]
    path = writing.output.with_name("known.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in rows))
    recipe = replace(
        writing.recipe,
        mode=ModeConfig(
            name="off_policy", written=WrittenConfig(str(path), answer_column="answer_ids")
        ),
        train=TrainConfig(global_batch_size=1),
    )
    tokenizer = load_tokenizer(writing.recipe.teacher.hf_path)
    taken = WrittenSource(recipe, tokenizer, stops).take(len(rows), LIMIT, 0)
    sampled = sorted(tuple(record["answer_ids"]) for record in rows)
    assert sorted(each.prefix_ids for each in taken) == sampled


def test_a_stopped_one_goes_on_and_keeps_what_it_has(
    writing: Writing, server: Server, original_weights: None
) -> None:
    serving = Serving(server)
    write_answers(writing, serving, Console(quiet=True))
    whole = lines(writing.output)
    writing.output.unlink()
    kept = {**whole[3], "answer": "kept"}
    writing.partial.write_text(json.dumps(kept) + "\n" + '{"row": 1, "sam')
    write_answers(writing, serving, Console(quiet=True))
    again = lines(writing.output)
    assert again[3]["answer"] == "kept"
    assert [each["answer_ids"] for each in again] == [each["answer_ids"] for each in whole]
    assert serving.asked == 2
    writing.output.unlink()
    writing.partial.write_text("".join(json.dumps(record) + "\n" for record in whole))
    write_answers(writing, serving, Console(quiet=True))
    assert serving.asked == 2  # nothing was missing: no server was wanted
    writing.partial.write_text(json.dumps(kept) + "\n")
    with pytest.raises(ValueError, match="was begun with temperature=0.0, now it is 1.0"):
        write_answers(replace(writing, temperature=1.0), serving, Console(quiet=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answers_per_prompt": 2}, "2 greedy answers are one answer"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0 is too small"),
        ({"rows": -1}, "--rows -1 is too small"),
        ({"temperature": -1.0}, "--temperature -1.0 must be 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(writing: Writing, change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(writing, **change).check()
