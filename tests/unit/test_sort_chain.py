import json
from pathlib import Path

import numpy as np
import pytest

from megatron_prefix.data.tokenizers import load_tokenizer, stop_token_ids
from megatron_prefix.tasks import sort_chain
from megatron_prefix.tasks.sort_chain import Problem, ScoredAnswer, score

EXAMPLE = Problem(
    "^u6a6e8j3h0b0>",
    "abehju|a6:00+6=6;b0:68+0=8;e8:84+8=2;h0:26+0=6;j3:68+3=1;u6:13+6=9;#682619$",
)
DIGITS = {"u": 6, "a": 6, "e": 8, "j": 3, "h": 0, "b": 0}
ALL_RIGHT = ScoredAnswer(accuracy=True, plan=True, execution=True, valid_plan=True)


def test_the_example_follows_from_its_plan() -> None:
    assert sort_chain.response_of("abehju", DIGITS) == EXAMPLE.response
    assert EXAMPLE.answer == "#682619$"


def test_problems_are_well_formed_and_true() -> None:
    problems = sort_chain.make_problems(200, seed=4)
    for problem in problems:
        prompt, response = problem.prompt, problem.response
        assert (len(prompt), len(response)) == (14, 75)
        letters, digits = prompt[1:-1:2], prompt[2:-1:2]
        assert prompt[0] == "^" and prompt[-1] == ">" and len(set(letters)) == 6
        assert response[:7] == "".join(sorted(letters)) + "|"
        total, totals = 0, ""
        for letter in sorted(letters):
            digit = int(digits[letters.index(letter)])
            total = (3 * total % 10 + digit) % 10
            totals += str(total)
        assert response[-8:] == f"#{totals}$"
    assert len({problem.prompt for problem in problems}) == 200
    assert {symbol for problem in problems for symbol in problem.prompt} == set(
        "^>0123456789abcdefghijklmnopqrstuvwxyz"
    )


def test_the_seed_decides_the_problems() -> None:
    assert sort_chain.make_problems(5, seed=1) == sort_chain.make_problems(5, seed=1)
    assert sort_chain.make_problems(5, seed=1) != sort_chain.make_problems(5, seed=2)


def test_held_out_problems_are_not_trained_on() -> None:
    trained = sort_chain.make_problems(sort_chain.NUM_TRAIN, sort_chain.TRAIN_SEED)
    held_out = sort_chain.make_problems(sort_chain.NUM_HELD_OUT, sort_chain.HELD_OUT_SEED)
    assert not {p.prompt for p in trained} & {p.prompt for p in held_out}


def test_ids_are_the_symbols_places_and_unknown_symbols_are_refused() -> None:
    assert sort_chain.encode("_^$09az") == (0, 1, 2, 10, 19, 20, 45)
    assert sort_chain.decode(sort_chain.encode(EXAMPLE.response)) == EXAMPLE.response
    with pytest.raises(ValueError, match="not a SORT-CHAIN symbol: 'A'"):
        sort_chain.encode("aA")


WRONG_STEP = EXAMPLE.response.replace("68+0=8", "68+0=7")
OTHER_PLAN = sort_chain.response_of("baehju", DIGITS)
STRANGE_LETTER = EXAMPLE.response.replace("a", "z")
DOUBLE_LETTER = "aa" + EXAMPLE.response[2:]


@pytest.mark.parametrize(
    ("generated", "expected"),
    [
        (EXAMPLE.response, ALL_RIGHT),
        (EXAMPLE.response + "__", ALL_RIGHT),
        (WRONG_STEP, ScoredAnswer(accuracy=True, plan=True, execution=False, valid_plan=True)),
        (OTHER_PLAN, ScoredAnswer(accuracy=False, plan=False, execution=True, valid_plan=True)),
        (STRANGE_LETTER, ScoredAnswer(True, plan=False, execution=False, valid_plan=False)),
        (DOUBLE_LETTER, ScoredAnswer(True, plan=False, execution=False, valid_plan=False)),
        (EXAMPLE.response[:-1], ScoredAnswer(False, plan=True, execution=False, valid_plan=True)),
        (EXAMPLE.response[:6], ScoredAnswer(False, False, False, False)),
        ("", ScoredAnswer(False, False, False, False)),
    ],
)
def test_scores_of_texts_and_ids(generated: str, expected: ScoredAnswer) -> None:
    assert score(EXAMPLE, generated) == expected
    assert score(EXAMPLE, list(sort_chain.encode(generated))) == expected


def test_supervised_rows_hold_prompts_and_responses_with_the_prompt_out_of_the_loss() -> None:
    rows = sort_chain.make_sft_rows(50, np.random.default_rng(0))
    assert rows.input_ids.shape == rows.loss_mask.shape == (50, 89)
    assert not rows.loss_mask[:, :14].any() and rows.loss_mask[:, 14:].all()
    for ids in rows.input_ids:
        text = sort_chain.decode(ids)
        assert score(Problem(text[:14], text[14:]), text[14:]) == ALL_RIGHT
        assert text[14:20] == "".join(sorted(text[14:20]))


def test_random_plans_are_executed_correctly_and_all_in_the_loss() -> None:
    rows = sort_chain.make_sft_rows(200, np.random.default_rng(0), "random")
    texts = [sort_chain.decode(ids) for ids in rows.input_ids]
    scored = [score(Problem(text[:14], text[14:]), text[14:]) for text in texts]
    assert all(answer.execution for answer in scored)
    assert sum(text[14:20] == "".join(sorted(text[14:20])) for text in texts) < 5
    assert rows.loss_mask[:, 14:].all()


def test_corrupt_plans_go_on_sorted_and_only_the_corrupt_letters_leave_the_loss() -> None:
    rows = sort_chain.make_sft_rows(1000, np.random.default_rng(0), "corrupt")
    corrupted = 75 - rows.loss_mask.sum(axis=1)
    assert set(corrupted.tolist()) == set(range(7))
    assert 0.55 < (corrupted > 0).mean() < 0.65
    for ids, mask, count in zip(rows.input_ids, rows.loss_mask, corrupted, strict=True):
        text = sort_chain.decode(ids)
        rest = text[14 + count : 20]
        assert rest == "".join(sorted(rest)) and mask[14 + count :].all()
        assert score(Problem(text[:14], text[14:]), text[14:]).execution


def test_the_tokenizer_gives_one_id_a_symbol_and_adds_none(tmp_path: Path) -> None:
    sort_chain.write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    for text in (EXAMPLE.prompt, EXAMPLE.response, sort_chain.SYMBOLS):
        ids = tokenizer(text)["input_ids"]
        assert tuple(ids) == sort_chain.encode(text)
        assert tokenizer.decode(ids) == text
    assert len(tokenizer(EXAMPLE.prompt)["input_ids"]) == 14
    assert tokenizer.decode(sort_chain.encode("a1$"), skip_special_tokens=True) == "a1"
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (0, 1, 2) and len(tokenizer) == 46 and tokenizer.chat_template is None


def test_a_data_file_has_prompts_and_answers(tmp_path: Path) -> None:
    path = sort_chain.write_dataset(tmp_path / "new" / "a.jsonl", 3, seed=7)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    problems = sort_chain.make_problems(3, seed=7)
    assert rows == [{"prompt": p.prompt, "answer": p.response[-8:]} for p in problems]
    assert [file.name for file in path.parent.iterdir()] == ["a.jsonl"]


def test_data_is_written_once(tmp_path: Path) -> None:
    files = sort_chain.prepare_data(tmp_path)
    assert len(files.train.read_text().splitlines()) == sort_chain.NUM_TRAIN
    assert len(files.held_out.read_text().splitlines()) == sort_chain.NUM_HELD_OUT
    files.train.write_text("kept")
    assert sort_chain.prepare_data(tmp_path) == files == sort_chain.data_files(tmp_path)
    assert files.train.read_text() == "kept"


@pytest.mark.parametrize("name", ["teacher", "student_a", "student_b"])
def test_the_packaged_models_carry_the_tasks_tokenizer(name: str) -> None:
    folder = sort_chain.model_folder(name)
    tokenizer = load_tokenizer(str(folder))
    assert tuple(tokenizer(EXAMPLE.prompt)["input_ids"]) == sort_chain.encode(EXAMPLE.prompt)
    assert stop_token_ids(str(folder)) == (sort_chain.EOS_ID,)
    assert (folder / "model.safetensors").stat().st_size < 1.5e6
