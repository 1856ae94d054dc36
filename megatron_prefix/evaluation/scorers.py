"""Whether a generated text answers a problem: ``exact``, ``suffix``, ``math``, or a user's own.

A verdict is True, False, or None where no answer could be read, which counts as wrong.
"""

import difflib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_prefix.users_code import call_users, import_by_path

_MATH_TIMEOUT_S = 5  # of one parse or comparison, math-verify's default


@dataclass(frozen=True)
class Generated:
    """A generated text, without special tokens and as it was sampled, end token included."""

    text: str
    raw: str


Verdict = bool | None
Scorer = Callable[[Generated, str], Verdict]


def exact(generated: Generated, answer: str) -> Verdict:
    """The whole text is the answer, but for spaces around it."""
    return answer.strip() in (generated.text.strip(), generated.raw.strip())


def suffix(generated: Generated, answer: str) -> Verdict:
    """The text ends with the answer; the answer may hold the end token's text or not."""
    wanted = answer.strip()
    return generated.text.rstrip().endswith(wanted) or generated.raw.rstrip().endswith(wanted)


def math(generated: Generated, answer: str) -> Verdict:
    """math-verify's comparison of the text's last or boxed expression with the answer.

    An answer may be GSM8K's, a solution with the number after ``####``. None where either has no
    expression that can be read.
    """
    from math_verify import parse, verify

    # math-verify keeps its time limits with SIGALRM, which only the main thread may set.
    in_main = threading.current_thread() is threading.main_thread()
    limit: Any = _MATH_TIMEOUT_S if in_main else None
    wanted = parse(f"${answer.rpartition('####')[2].strip()}$", parsing_timeout=limit)
    found = parse(generated.text, parsing_timeout=limit)
    if not wanted or not found:
        return None
    return bool(verify(wanted, found, timeout_seconds=limit))


SCORERS: Mapping[str, Scorer] = {"exact": exact, "suffix": suffix, "math": math}


def load_scorer(name: str) -> Scorer:
    """The scorer of ``eval.scorer``: one of :data:`SCORERS` or "package.module:function".

    A user's function takes the text without special tokens and the answer, and returns True,
    False or None. Raises ValueError for an unknown name or a function that cannot be imported.
    """
    if name in SCORERS:
        return SCORERS[name]
    if ":" in name:
        return _users_scorer(name)
    near = difflib.get_close_matches(name, SCORERS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(SCORERS)}"
    raise ValueError(
        f"eval.scorer={name!r} is unknown. {hint} (or name your own: package.module:function)"
    )


def _users_scorer(name: str) -> Scorer:
    function = import_by_path("eval.scorer", name, kind="function")
    if not callable(function):
        raise ValueError(f"eval.scorer={name!r} is no function; it must take (text, answer)")

    def score(generated: Generated, answer: str) -> Verdict:
        asked = f"the answer {answer[:40]!r}"
        verdict = call_users(f"eval.scorer={name}", asked, function, generated.text, answer)
        if verdict is not None and not isinstance(verdict, bool):
            raise ValueError(
                f"eval.scorer={name!r} returned {verdict!r}; it must return True, False or None"
            )
        return verdict

    return score
