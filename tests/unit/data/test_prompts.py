import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase as Tokenizer

from megatron_prefix.config import DataConfig
from megatron_prefix.data.prompts import PromptStream

pytestmark = pytest.mark.usefixtures("own_cache")


def write_lines(path: Path, rows: list[dict[str, Any]]) -> DataConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(path=str(path), chat_template="never")


def texts(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"p{row}"} for row in range(n)]


def test_a_pass_gives_every_row_once_tokenised_and_the_next_is_shuffled_anew(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    stream = PromptStream(write_lines(tmp_path / "a.jsonl", texts(20)), tokenizer)
    first, second = stream.take(20), stream.take(20)
    assert sorted(prompt.row for prompt in first) == list(range(20))
    assert sorted(prompt.row for prompt in second) == list(range(20))
    assert [prompt.row for prompt in first] != [prompt.row for prompt in second]
    assert [prompt.row for prompt in first] != list(range(20))
    assert [prompt.index for prompt in first + second] == list(range(40))
    assert all(prompt.input_ids == tuple(f"p{prompt.row}".encode()) for prompt in first)
    assert stream.num_rows == 20 and stream.epoch == 1


def test_the_seed_alone_decides_the_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write_lines(tmp_path / "a.jsonl", texts(20))
    again, other = PromptStream(data, tokenizer), PromptStream(replace(data, seed=1), tokenizer)
    taken = PromptStream(data, tokenizer).take(30)
    assert again.take(30) == taken
    assert [prompt.row for prompt in other.take(30)] != [prompt.row for prompt in taken]


def test_without_shuffling_rows_come_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = replace(write_lines(tmp_path / "a.jsonl", texts(3)), shuffle=False)
    rows = [prompt.row for prompt in PromptStream(data, tokenizer).take(7)]
    assert rows == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("taken", [0, 3, 7, 20, 21, 45])
def test_a_resumed_stream_goes_on_exactly(
    tmp_path: Path, tokenizer: Tokenizer, streaming: bool, taken: int
) -> None:
    data = replace(write_lines(tmp_path / "a.jsonl", texts(20)), streaming=streaming)
    whole = PromptStream(data, tokenizer)
    whole.take(taken)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = PromptStream(data, tokenizer)
    resumed.take(5)
    resumed.load_state_dict(state)
    assert resumed.take(30) == whole.take(30)
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [({"seed": 3}, "seed=0 but data.seed is now 3"), ({"shuffle": False}, "shuffle=1")],
)
def test_a_position_of_another_order_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any], words: str
) -> None:
    data = write_lines(tmp_path / "a.jsonl", texts(4))
    state = PromptStream(data, tokenizer).state_dict()
    with pytest.raises(ValueError, match=words):
        PromptStream(replace(data, **change), tokenizer).load_state_dict(state)


def test_a_position_in_another_data_set_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    state = PromptStream(write_lines(tmp_path / "a.jsonl", texts(4)), tokenizer).state_dict()
    other = PromptStream(write_lines(tmp_path / "b.jsonl", texts(5)), tokenizer)
    with pytest.raises(ValueError, match="num_rows=4 but"):
        other.load_state_dict(state)


def test_shards_are_disjoint_and_together_the_whole_in_order(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    data = write_lines(tmp_path / "a.jsonl", texts(10))
    whole = PromptStream(data, tokenizer).take(24)
    shards = [PromptStream(data, tokenizer).shard(rank, 3) for rank in range(3)]
    parts = [shard.take(5) + shard.take(3) for shard in shards]
    assert [prompt for group in zip(*parts, strict=True) for prompt in group] == whole
    assert shards[0].state_dict() == shards[1].state_dict() == shards[2].state_dict()


def test_a_shard_of_a_stream_begins_where_the_stream_is(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    stream = PromptStream(write_lines(tmp_path / "a.jsonl", texts(10)), tokenizer)
    stream.take(3)
    shard = stream.shard(1, 2)
    following = stream.take(4)
    assert shard.take(2) == following[1::2]


def test_a_rank_outside_the_world_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    stream = PromptStream(write_lines(tmp_path / "a.jsonl", texts(2)), tokenizer)
    with pytest.raises(ValueError, match="rank 2 .* world 2"):
        stream.shard(2, 2)


def test_overlong_prompts_are_dropped_whole_counted_and_logged_once(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "x" * length} for length in (1, 5, 6, 2, 9)]
    data = replace(write_lines(tmp_path / "a.jsonl", rows), max_prompt_length=5)
    stream = PromptStream(data, tokenizer)
    with caplog.at_level(logging.WARNING):
        first = stream.take(3)
        later = stream.take(7)
    assert sorted(len(prompt.input_ids) for prompt in first) == [1, 2, 5]
    assert [prompt.index for prompt in first + later] == list(range(10))
    assert stream.dropped == 2
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "dropped 2 of 5 prompts" in said[0] and "=5 tokens" in said[0]


def test_the_count_of_dropped_prompts_survives_a_resume(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    rows = [{"prompt": "x" * length} for length in (1, 6, 2, 9)]
    data = replace(write_lines(tmp_path / "a.jsonl", rows), max_prompt_length=5, shuffle=False)
    stream = PromptStream(data, tokenizer)
    stream.take(2)
    resumed = PromptStream(data, tokenizer)
    resumed.load_state_dict(stream.state_dict())
    resumed.take(1)
    assert stream.dropped == 1 and resumed.dropped == 2


def test_an_overlong_prompt_is_an_error_where_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "ok"}, {"prompt": "too long"}]
    data = write_lines(tmp_path / "a.jsonl", rows)
    data = replace(data, max_prompt_length=5, overlong="error", shuffle=False)
    stream = PromptStream(data, tokenizer)
    with pytest.raises(ValueError, match="row 1 has 8 prompt tokens, more than .*=5; raise it"):
        stream.take(2)


def test_a_set_of_overlong_prompts_is_refused_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = replace(write_lines(tmp_path / "a.jsonl", texts(3)), max_prompt_length=1)
    with pytest.raises(ValueError, match="every prompt is longer than data.max_prompt_length=1"):
        PromptStream(data, tokenizer)


def test_an_unknown_policy_for_overlong_prompts_is_refused(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    data = replace(write_lines(tmp_path / "a.jsonl", texts(3)), overlong="cut")
    with pytest.raises(ValueError, match="data.overlong=cut must be drop or error"):
        PromptStream(data, tokenizer)


def decoded(data: DataConfig, tokenizer: Tokenizer) -> list[str]:
    taken = PromptStream(replace(data, shuffle=False), tokenizer).take(1)
    return [tokenizer.decode(prompt.input_ids) for prompt in taken]


@pytest.mark.parametrize(
    ("template", "system", "expected"),
    [
        ("never", "", "p0"),
        ("auto", "", "<user>p0<end><assistant>"),
        ("always", "", "<user>p0<end><assistant>"),
        ("auto", "Be short.", "<system>Be short.<end><user>p0<end><assistant>"),
    ],
)
def test_the_chat_template_and_system_prompt(
    tmp_path: Path, tokenizer: Tokenizer, template: str, system: str, expected: str
) -> None:
    data = write_lines(tmp_path / "a.jsonl", texts(1))
    assert decoded(replace(data, chat_template=template, system_prompt=system), tokenizer) == [
        expected
    ]


def test_messages_go_through_the_template_and_keep_their_own_system_prompt(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    system, user = {"role": "system", "content": "own"}, {"role": "user", "content": "hi"}
    data = write_lines(tmp_path / "a.jsonl", [{"messages": [system, user]}])
    data = replace(data, prompt_column="messages", chat_template="auto", system_prompt="other")
    assert decoded(data, tokenizer) == ["<system>own<end><user>hi<end><assistant>"]
    data = replace(write_lines(tmp_path / "b.jsonl", [{"prompt": [user]}]), chat_template="auto")
    data = replace(data, system_prompt="other")
    assert decoded(data, tokenizer) == ["<system>other<end><user>hi<end><assistant>"]


def test_messages_without_a_template_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    data = write_lines(tmp_path / "a.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(ValueError, match="row 0: prompt holds chat messages but no chat template"):
        PromptStream(data, tokenizer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chat_template": "maybe"}, "data.chat_template=maybe must be auto, always or never"),
        ({"system_prompt": "s"}, "data.system_prompt is set but no chat template"),
    ],
)
def test_template_settings_that_cannot_be_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any], words: str
) -> None:
    data = replace(write_lines(tmp_path / "a.jsonl", texts(1)), **change)
    with pytest.raises(ValueError, match=words):
        PromptStream(data, tokenizer)


def test_a_template_is_asked_for_that_the_tokenizer_lacks(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    data = write_lines(tmp_path / "a.jsonl", texts(1))
    assert decoded(replace(data, chat_template="auto"), tokenizer) == ["p0"]
    with pytest.raises(ValueError, match="data.chat_template=always but the tokenizer has none"):
        PromptStream(replace(data, chat_template="always"), tokenizer)


def test_a_template_that_refuses_a_row_names_the_row(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    data = replace(write_lines(tmp_path / "a.jsonl", texts(1)), chat_template="auto")
    with pytest.raises(ValueError, match="row 0: prompt is refused .* roles must alternate"):
        PromptStream(data, tokenizer)


def test_a_bad_row_after_good_ones_is_named_when_it_is_reached(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    data = replace(write_lines(tmp_path / "a.jsonl", [*texts(2), {"other": "x"}]), shuffle=False)
    stream = PromptStream(data, tokenizer)
    with pytest.raises(ValueError, match="row 2: prompt is None"):
        stream.take(3)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "a", "answer": "b"}, "prompt_column=prompt is not a column .* question,"),
        ({"prompt": 5}, "row 0: prompt is 5, not a text or a list"),
        ({"prompt": None, "answer": "b"}, "row 0: prompt is None, not a text"),
        ({"prompt": ["a", "b"]}, r"row 0: prompt is \['a', 'b'\], not a text"),
        ({"prompt": ["x" * 99]}, r"row 0: prompt is \['x{55}\.\.\., not a text"),
        ({"prompt": []}, r"row 0: prompt is \[\], not a text"),
        ({"prompt": ""}, "row 0: prompt has no tokens"),
    ],
)
def test_a_row_that_is_no_prompt_is_named_in_one_line(
    tmp_path: Path, tokenizer: Tokenizer, streaming: bool, row: dict[str, Any], words: str
) -> None:
    data = replace(write_lines(tmp_path / "a.jsonl", [row]), streaming=streaming)
    with pytest.raises(ValueError, match=words) as caught:
        PromptStream(data, tokenizer)
    assert "\n" not in str(caught.value) and "a.jsonl" in str(caught.value)
