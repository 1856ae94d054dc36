"""SORT-CHAIN: sort six letters (the plan), then add up a chain modulo 10 (the execution).

A prompt ``^u6a6e8j3h0b0>`` holds six distinct letters, each with a digit. Its response is a plan,
the letters in order and ``|``; ten symbols a letter, ``letter d : t m + d = t' ;`` with t = 0 at
first, m = 3t mod 10 and t' = (m + d) mod 10; and ``#``, the six t', ``$``:
``abehju|a6:00+6=6;b0:68+0=8;...#682619$``. Small enough for two CPU cores, and a plan and an
execution can be weak apart from each other.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_prefix.run_files.whole_file import whole_file

SYMBOLS = "_^$>|:+=;#0123456789abcdefghijklmnopqrstuvwxyz"  # a symbol's place is its token id
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
NUM_LETTERS = 6
PROMPT_LENGTH = 2 + 2 * NUM_LETTERS  # 14 tokens
PLAN_LENGTH = NUM_LETTERS + 1
ANSWER_LENGTH = NUM_LETTERS + 2
RESPONSE_LENGTH = PLAN_LENGTH + 10 * NUM_LETTERS + ANSWER_LENGTH  # 75 tokens
CORRUPT_SHARE = 0.6  # of the rows of corrupt-plan data
TRAIN_SEED, HELD_OUT_SEED = 10_000, 20_000
NUM_TRAIN, NUM_HELD_OUT = 8192, 500

PlanKind = Literal["sorted", "random", "corrupt"]
_ID_OF = {symbol: place for place, symbol in enumerate(SYMBOLS)}
_ALPHABET = SYMBOLS[-26:]


@dataclass(frozen=True)
class Problem:
    """A prompt (14 symbols) and the response that goes with its plan (75 symbols)."""

    prompt: str
    response: str

    @property
    def answer(self) -> str:
        """``#``, six digits, ``$``."""
        return self.response[-ANSWER_LENGTH:]


@dataclass(frozen=True)
class ScoredAnswer:
    """What a generated response got right. ``execution`` means something where the plan is valid:
    average it over those."""

    accuracy: bool  # the last 8 symbols
    plan: bool  # the first 7 symbols
    execution: bool  # everything after the response's own plan
    valid_plan: bool  # the prompt's letters in some order, then "|"


@dataclass(frozen=True)
class SftRows:
    """Supervised rows: n prompts with their responses, all of one length T = 89."""

    input_ids: np.ndarray  # int64 [n, T]
    loss_mask: np.ndarray  # bool [n, T], True where the token is to be predicted


@dataclass(frozen=True)
class DataFiles:
    """JSON lines with the columns ``prompt`` and ``answer``."""

    train: Path
    held_out: Path


def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text. Raises ValueError for a symbol that the task does not have."""
    unknown = sorted(set(text) - set(SYMBOLS))
    if unknown:
        raise ValueError(f"not a SORT-CHAIN symbol: {unknown[0]!r}; the symbols are {SYMBOLS}")
    return tuple(_ID_OF[symbol] for symbol in text)


def decode(ids: Sequence[int]) -> str:
    """The text of token ids, special symbols included."""
    return "".join(SYMBOLS[place] for place in ids)


def response_of(plan: str, digit_of: dict[str, int]) -> str:
    """The 75 symbols that follow from a plan: six letters in any order, each with its digit."""
    steps, totals, total = [], "", 0
    for letter in plan:
        digit, tripled = digit_of[letter], 3 * total % 10
        following = (tripled + digit) % 10
        steps.append(f"{letter}{digit}:{total}{tripled}+{digit}={following};")
        total = following
        totals += str(total)
    return f"{plan}|{''.join(steps)}#{totals}$"


def make_problems(n: int, seed: int) -> list[Problem]:
    """n problems with their true responses; the same for the same seed."""
    return [problem for problem, _ in _sample(n, np.random.default_rng(seed), "sorted")]


def make_sft_rows(n: int, rng: np.random.Generator, plan: PlanKind = "sorted") -> SftRows:
    """n fresh supervised rows, executed correctly whatever their plan.

    ``sorted``: true data. ``random``: the letters in any order. ``corrupt``: in 60% of the rows
    the first one to six letters are random ones and out of the loss, the others follow sorted.
    """
    samples = _sample(n, rng, plan)
    ids = np.array([encode(problem.prompt + problem.response) for problem, _ in samples], np.int64)
    first = PROMPT_LENGTH + np.array([corrupted for _, corrupted in samples], np.int64)
    return SftRows(ids, np.arange(ids.shape[1])[None, :] >= first[:, None])


def _sample(n: int, rng: np.random.Generator, plan: PlanKind) -> list[tuple[Problem, int]]:
    """n problems, each with the number of letters that its plan opens with out of order."""
    letters = np.argsort(rng.random((n, len(_ALPHABET))), axis=1)[:, :NUM_LETTERS]
    digits = rng.integers(0, 10, (n, NUM_LETTERS))
    return [
        _one_problem([_ALPHABET[place] for place in row], digit_row.tolist(), rng, plan)
        for row, digit_row in zip(letters, digits, strict=True)
    ]


def _one_problem(
    letters: list[str], digits: list[int], rng: np.random.Generator, plan: PlanKind
) -> tuple[Problem, int]:
    digit_of = dict(zip(letters, digits, strict=True))
    prompt = f"^{''.join(f'{letter}{digit_of[letter]}' for letter in letters)}>"
    corrupted = 0
    if plan == "corrupt" and rng.random() < CORRUPT_SHARE:
        corrupted = int(rng.integers(1, NUM_LETTERS + 1))
    shuffled = NUM_LETTERS if plan == "random" else corrupted
    order = rng.permutation(NUM_LETTERS) if shuffled else np.arange(NUM_LETTERS)
    opening = [letters[place] for place in order[:shuffled]]
    rest = sorted(set(letters) - set(opening))
    return Problem(prompt, response_of("".join(opening + rest), digit_of)), corrupted


def score(problem: Problem, generated: Sequence[int] | str) -> ScoredAnswer:
    """Scores a response given as token ids or text; what follows its first ``$`` is left out."""
    text = generated if isinstance(generated, str) else decode(generated)
    text = text[: text.index("$") + 1] if "$" in text else text
    plan = text[:PLAN_LENGTH]
    digit_of = {letter: int(digit) for letter, digit in _letters_and_digits(problem.prompt)}
    valid = plan.endswith("|") and sorted(plan[:-1]) == sorted(digit_of)
    return ScoredAnswer(
        accuracy=text[-ANSWER_LENGTH:] == problem.answer,
        plan=plan == problem.response[:PLAN_LENGTH],
        execution=valid and text == response_of(plan[:-1], digit_of),
        valid_plan=valid,
    )


def _letters_and_digits(prompt: str) -> list[tuple[str, str]]:
    return list(zip(prompt[1:-1:2], prompt[2:-1:2], strict=True))


def write_dataset(path: str | Path, n: int, seed: int) -> Path:
    """Writes n problems as JSON lines with the columns ``prompt`` and ``answer``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"prompt": p.prompt, "answer": p.answer} for p in make_problems(n, seed))
    with whole_file(path) as file:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data_files(folder: str | Path) -> DataFiles:
    """Where :func:`prepare_data` puts its files."""
    return DataFiles(Path(folder) / "train.jsonl", Path(folder) / "held_out.jsonl")


def prepare_data(folder: str | Path) -> DataFiles:
    """Writes 8192 training and 500 held-out problems, where they are not there yet."""
    files = data_files(folder)
    if not files.train.is_file():
        write_dataset(files.train, NUM_TRAIN, TRAIN_SEED)
    if not files.held_out.is_file():
        write_dataset(files.held_out, NUM_HELD_OUT, HELD_OUT_SEED)
    return files


def write_tokenizer(folder: str | Path) -> None:
    """Writes a Hugging Face tokenizer of one token a symbol, which adds no specials itself.

    Characters the task does not have become the pad symbol, as servers warm up with any text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(dict(_ID_OF), unk_token=SYMBOLS[PAD_ID]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SYMBOLS[PAD_ID],
        bos_token=SYMBOLS[BOS_ID],
        eos_token=SYMBOLS[EOS_ID],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))


def model_folder(name: str) -> Path:
    """The Hugging Face folder of the packaged ``teacher``, ``student_a`` or ``student_b``."""
    return Path(__file__).parent / "sort_chain_models" / name
