import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers import PreTrainedTokenizerBase as Tokenizer

from megatron_prefix.config import DataConfig, EvalConfig
from megatron_prefix.data.tokenizers import load_tokenizer
from megatron_prefix.evaluation.evaluate import (
    CollectFn,
    evaluate,
    load_eval_set,
    write_samples,
)
from megatron_prefix.evaluation.pass_at_k import wilson_interval
from megatron_prefix.rollout.protocol import NoRollouts
from megatron_prefix.tasks import sort_chain
from megatron_prefix.types import FinishReason, Prompt, Rollout

GSM8K = Path(__file__).parents[2] / "assets" / "gsm8k_8.jsonl"
END = 261
BARE = DataConfig(chat_template="never")


pytestmark = pytest.mark.usefixtures("own_cache")


def rollout(prompt: Prompt, ids: Sequence[int], finish: FinishReason = "stop") -> Rollout:
    logprobs = (0.0,) * len(ids)
    return Rollout(prompt.input_ids, tuple(ids), logprobs, finish, 0, prompt.index)


def answer_from(table: Sequence[str]) -> CollectFn:
    """Answers the prompts with a table of texts; an end token follows where there is room."""

    def collect(prompts: Sequence[Prompt], max_new_tokens: int) -> list[Rollout]:
        return [
            rollout(prompt, [*text.encode(), END])
            if len(text.encode()) < max_new_tokens
            else rollout(prompt, text.encode()[:max_new_tokens], "length")
            for prompt, text in zip(prompts, table, strict=True)
        ]

    return collect


def write_set(path: Path, rows: list[dict[str, Any]]) -> EvalConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvalConfig(path=str(path), scorer="suffix", samples=0, max_new_tokens=16)


def test_answers_are_counted_right_truncated_and_unparsable(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = replace(
        write_set(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "answer": str(i)} for i in range(5)]),
        scorer="math",
    )
    table = ["it is 0", "it is 7", "no idea", "x" * 20, "4"]
    scored: list[int] = []
    result = evaluate(config, tokenizer, answer_from(table), BARE, lambda: scored.append(1))
    assert (result.n, result.accuracy, result.truncated, result.unparsable) == (5, 0.4, 1, 2)
    assert len(scored) == 5
    assert result.tokens == 8 + 8 + 8 + 16 + 2
    assert result.interval == wilson_interval(2, 5) and result.seconds > 0
    first, truncated = result.samples[0], result.samples[3]
    assert (first.row, first.prompt, first.generated, first.answer) == (0, "q0", "it is 0", "0")
    assert first.correct and first.parsed and first.finish_reason == "stop" and first.tokens == 8
    assert not truncated.parsed and truncated.finish_reason == "length"


def test_gsm8k_rows_are_scored_by_their_final_number(tokenizer: Tokenizer) -> None:
    config = EvalConfig(str(GSM8K), prompt_column="question", max_new_tokens=512)
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    wrong = "The answer is \\boxed{-1}."
    table = [row["answer"] for row in rows[:6]] + [wrong, wrong]
    result = evaluate(config, tokenizer, answer_from(table), BARE)
    assert (result.n, result.accuracy, result.unparsable) == (8, 0.75, 0)
    assert result.samples[7].prompt == rows[7]["question"]


def test_the_training_prompts_template_is_used(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = write_set(tmp_path / "a.jsonl", [{"prompt": "q", "answer": "a"}])
    data = DataConfig(system_prompt="Be short.", shuffle=True, path="elsewhere", name="main")
    result = evaluate(config, tokenizer, answer_from(["a"]), data)
    assert result.samples[0].prompt == "<system>Be short.<end><user>q<end><assistant>"
    assert result.accuracy == 1.0 and result.samples[0].generated == "a"


def test_the_first_rows_are_taken_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"q{i}", "answer": i} for i in range(9)]
    config = replace(write_set(tmp_path / "a.jsonl", rows), samples=3)
    problems = load_eval_set(config, tokenizer, BARE)
    assert [prompt.row for prompt in problems.prompts] == [0, 1, 2]
    assert problems.answers == ("0", "1", "2") and problems.dropped == 0
    assert len(load_eval_set(replace(config, samples=0), tokenizer, BARE).prompts) == 9


def test_overlong_prompts_are_left_out_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "q" * length, "answer": "a"} for length in (2, 9, 3)]
    config = write_set(tmp_path / "a.jsonl", rows)
    data = replace(BARE, max_prompt_length=4)
    result = evaluate(config, tokenizer, answer_from(["a", "b"]), data)
    assert (result.n, result.dropped, result.accuracy) == (2, 1, 0.5)
    assert [sample.row for sample in result.samples] == [0, 2]
    with pytest.raises(ValueError, match="eval.path=.*: row 1 has 9 prompt tokens"):
        load_eval_set(config, tokenizer, replace(data, overlong="error"))
    with pytest.raises(ValueError, match="eval.path=.*: every prompt is longer"):
        load_eval_set(config, tokenizer, replace(data, max_prompt_length=1))


@pytest.mark.parametrize(
    ("rows", "change", "words"),
    [
        ([{"prompt": "a"}], {}, "eval.answer_column=answer is not a column of .*; it has prompt"),
        ([{"question": "a", "answer": "b"}], {}, "eval.prompt_column=prompt is not a column"),
        ([{"prompt": "a", "answer": None}], {}, r"row 0 has no answer in answer \(None\)"),
        ([{"prompt": "a", "answer": " "}], {}, "row 0 has no answer in answer"),
        ([], {}, "eval.path=.*: the data set is empty"),
        ([{"prompt": "a", "answer": "b"}], {"scorer": "sufix"}, "Did you mean 'suffix'"),
        ([{"prompt": "a", "answer": "b"}], {"samples": -1}, "eval.samples=-1 must be 0"),
        (
            [{"prompt": "a", "answer": "b"}],
            {"max_new_tokens": 0},
            "eval.max_new_tokens=0 at least 1",
        ),
        ([{"prompt": "a", "answer": "b"}], {"path": "none.jsonl"}, "eval.path=none.jsonl: no such"),
    ],
)
def test_bad_sets_and_settings_are_refused(
    tmp_path: Path,
    tokenizer: Tokenizer,
    rows: list[dict[str, Any]],
    change: dict[str, Any],
    words: str,
) -> None:
    config = replace(write_set(tmp_path / "a.jsonl", rows), **change)
    with pytest.raises(ValueError, match=words) as caught:
        evaluate(config, tokenizer, answer_from(["b"]), BARE)
    assert "\n" not in str(caught.value)


def test_missing_answers_are_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = write_set(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(NoRollouts, match="1 answers were asked for and 0 came"):
        evaluate(config, tokenizer, lambda prompts, max_new_tokens: [], BARE)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (443, 500)])
def test_wilsons_interval_is_where_the_score_test_rejects(successes: int, n: int) -> None:
    low, high = wilson_interval(successes, n)
    share = successes / n
    for bound in (low, high):
        if 1e-9 < bound < 1 - 1e-9:
            z = abs(share - bound) / (bound * (1 - bound) / n) ** 0.5
            assert z == pytest.approx(1.959964, rel=1e-6)
    assert 0 <= low <= share <= high + 1e-12 and high <= 1 and high - low > 0


def test_samples_are_written_as_json_lines(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "水?", "answer": "a"}, {"prompt": "r", "answer": "b"}]
    config = write_set(tmp_path / "a.jsonl", rows)
    result = evaluate(config, tokenizer, answer_from(["a", "c\nd"]), BARE)
    write_samples(tmp_path / "samples.jsonl", result.samples)
    written = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in written] == [True, False]
    assert written[0]["prompt"] == "水?" and written[1]["generated"] == "c\nd"
    assert set(written[0]) == set(vars(result.samples[0]))


def test_a_real_models_greedy_answers_on_the_toy_task(tmp_path: Path) -> None:
    folder = sort_chain.model_folder("student_b")
    tokenizer = load_tokenizer(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def collect(prompts: Sequence[Prompt], max_new_tokens: int) -> list[Rollout]:
        ids = torch.tensor([prompt.input_ids for prompt in prompts])
        settings = {"do_sample": False, "max_new_tokens": max_new_tokens}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, 14:]
        trimmed = [row[: row.index(2) + 1] if 2 in row else row for row in out.tolist()]
        return [
            rollout(prompt, row, "stop" if row[-1] == 2 else "length")
            for prompt, row in zip(prompts, trimmed, strict=True)
        ]

    path = sort_chain.write_dataset(tmp_path / "a.jsonl", 64, seed=5)
    config = EvalConfig(str(path), scorer="suffix", samples=0, max_new_tokens=75)
    result = evaluate(config, tokenizer, collect)
    problems = sort_chain.make_problems(64, seed=5)
    scored = [
        sort_chain.score(problem, sample.generated + "$")
        for problem, sample in zip(problems, result.samples, strict=True)
    ]
    assert result.accuracy == sum(answer.accuracy for answer in scored) / 64
    assert 0.05 < result.accuracy < 0.5 and result.n == 64
    assert evaluate(replace(config, max_new_tokens=9), tokenizer, collect).truncated == 64
