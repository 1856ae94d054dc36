import threading
from pathlib import Path

import pytest

from megatron_prefix.evaluation.scorers import Generated, Verdict, exact, load_scorer, math, suffix
from tests.refused import refusal_of


def said(text: str, end: str = "") -> Generated:
    return Generated(text, raw=text + end)


@pytest.mark.parametrize(
    ("generated", "answer", "right"),
    [
        (said("Paris"), "Paris", True),
        (said(" Paris\n"), "Paris", True),
        (said("Paris", "<end>"), "Paris", True),
        (said("Paris", "<end>"), "Paris<end>", True),
        (said("Paris"), "Paris<end>", False),
        (said("It is Paris"), "Paris", False),
        (said("paris"), "Paris", False),
    ],
)
def test_exact(generated: Generated, answer: str, right: bool) -> None:
    assert exact(generated, answer) is right


@pytest.mark.parametrize(
    ("generated", "answer", "right"),
    [
        (said("ab|#682619", "$"), "#682619$", True),
        (said("ab|#682619", "$"), "#682619", True),
        (said("ab|#682619"), "#682619", True),
        (said("ab|#682619"), "#682619$", False),
        (said("ab|#682619;"), "#682619", False),
        (said("ab|#682618", "$"), "#682619$", False),
        (said(""), "#682619$", False),
    ],
)
def test_suffix(generated: Generated, answer: str, right: bool) -> None:
    assert suffix(generated, answer) is right


GSM8K = "She sells 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 18"


@pytest.mark.parametrize(
    ("text", "answer", "verdict"),
    [
        ("So she makes 18 dollars.", GSM8K, True),
        ("16 - 7 = 9, 9 * 2 = 18\n#### 18", GSM8K, True),
        ("#### 9", GSM8K, False),
        ("It is $1234$.", "#### 1,234", True),
        (r"Thus \boxed{\frac{1}{2}}", "0.5", True),
        (r"Thus $(3,\pi/2)$", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"Thus $(3,\pi)$", r"\left( 3, \frac{\pi}{2} \right)", False),
        ("142.0", "142", True),
        ("I do not know", GSM8K, None),
        ("", GSM8K, None),
        ("18", "####", None),
    ],
)
def test_math(text: str, answer: str, verdict: Verdict) -> None:
    assert math(said(text), answer) is verdict


def test_math_works_off_the_main_thread() -> None:
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(math(said("18"), GSM8K)))
    thread.start()
    thread.join()
    assert verdicts == [True]


def test_scorers_are_found_by_name() -> None:
    assert [load_scorer(name) for name in ("exact", "suffix", "math")] == [exact, suffix, math]


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_scorer.py").write_text(
        "def upper(text, answer):\n"
        "    return None if not text else text == answer.upper()\n"
        "def number(text, answer):\n"
        "    return 0.5\n"
        "def ratio(text, answer):\n"
        "    return 1 / len(text) > 0.5\n"
        "CONSTANT = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "own_scorer"


def test_a_users_function_gets_the_text_without_special_tokens(own_module: str) -> None:
    scorer = load_scorer(f"{own_module}:upper")
    assert scorer(said("YES", "<end>"), "yes") is True
    assert scorer(said("no"), "no") is False
    assert scorer(said(""), "no") is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("maths", r"eval.scorer='maths' is unknown. Did you mean 'math'\?"),
        ("judge", "Choose one of exact, suffix, math"),
        ("own_scorer:lower", "eval.scorer='own_scorer:lower' cannot be imported"),
        ("no_such_module_here:f", "cannot be imported .*No module named"),
        (":f", "cannot be imported"),
        ("own_scorer:CONSTANT", "is no function"),
    ],
)
def test_a_scorer_that_cannot_be_is_refused(own_module: str, name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_scorer(name)


def test_a_users_verdict_must_be_a_verdict(own_module: str) -> None:
    with pytest.raises(ValueError, match="returned 0.5; it must return True, False or None"):
        load_scorer(f"{own_module}:number")(said("a"), "b")


def test_what_a_users_function_raises_names_it_and_the_place(own_module: str) -> None:
    told = refusal_of(load_scorer("own_scorer:ratio"), said(""), "b")
    assert told.startswith("eval.scorer=own_scorer:ratio: the answer 'b' raised ZeroDivisionError")
    assert told.endswith("(own_scorer.py, line 6)")
