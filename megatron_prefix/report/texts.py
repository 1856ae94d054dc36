"""Rollouts side by side: a problem's answer before training and after it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_prefix.report.markup import Html, element, join, shorten
from megatron_prefix.report.story import Answers, RunStory

_LIMIT = 2400  # characters of a text that are shown
_PROBLEMS = 8
# Of each kind (right before, right after), how many are shown, in this order.
_WANTED = (((False, True), 4), ((True, False), 2), ((False, False), 1), ((True, True), 1))


def answers_section(stories: Sequence[RunStory]) -> Html:
    """The same problems for every run that answered them."""
    told = [story for story in stories if story.answers]
    if not told:
        words = "No run kept answers: eval.path is not set, or its first evaluation is not done."
        return element("p", words, class_="quiet")
    rows = choose_rows(told[0].answers)
    cards = [_problem(row, told) for row in rows]
    first, last = told[0].answers[0], told[0].answers[-1]
    words = f"{len(rows)} of {len(last.by_row)} held-out problems of {told[0].label}"
    if first is not last:
        words += f", answered before (step {first.step}) and after (step {last.step})"
        right, wrong = _WANTED[0][1], _WANTED[1][1]
        words += f": up to {right} that became right, up to {wrong} that became wrong, then others"
    return join([element("p", words + ".", class_="lead"), *cards])


def choose_rows(answers: Sequence[Answers]) -> list[int]:
    """Problems to show: those that became right, became wrong, and one of each that stayed."""
    first, last = answers[0].by_row, answers[-1].by_row
    both = [row for row in last if row in first]
    chosen: list[int] = []
    for kind, wanted in _WANTED:
        found = [r for r in both if (bool(first[r]["correct"]), bool(last[r]["correct"])) == kind]
        chosen += found[:wanted]
    return (chosen + [row for row in both if row not in chosen])[:_PROBLEMS]


def _problem(row: int, stories: Sequence[RunStory]) -> Html:
    asked = stories[0].answers[-1].by_row[row]
    problem = element(
        "div", element("div", f"problem {row}", class_="what"), _text(asked["prompt"])
    )
    expected = element("div", "expected answer", class_="what")
    answer = element("div", expected, _text(str(asked["answer"])))
    parts = [element("div", problem, answer, class_="asked")]
    for story in stories:
        found = [(a.step, a.by_row[row]) for a in story.answers if row in a.by_row]
        if not found or any(sample["prompt"] != asked["prompt"] for _, sample in found):
            continue
        if len(stories) > 1:
            parts.append(element("div", story.label, class_="run"))
        parts.append(element("div", join(_answer(*each) for each in found), class_="sides"))
    return element("div", *parts, class_="card")


def _answer(step: int, sample: Mapping[str, Any]) -> Html:
    right = bool(sample["correct"])
    verdict = element("span", "\u2713 right" if right else "\u2717 wrong", class_=_tone(right))
    told = [f"{sample['tokens']} tokens"]
    if sample["finish_reason"] == "length":
        told.append("cut off at the length limit")
    if not sample.get("parsed", True):
        told.append("no answer could be read")
    when = f"after step {step}" if step else "before training"
    head = element("div", f"{when}: ", verdict, f", {', '.join(told)}", class_="what")
    return element("div", head, _text(sample["generated"]), class_="side")


def _tone(right: bool) -> str:
    return "good" if right else "bad"


def _text(value: str) -> Html:
    return element("div", shorten(value, _LIMIT), class_="text", dir="auto")


def training_rollouts(story: RunStory) -> Html:
    """The first and the last rollouts that the run logged of its training, folded away."""
    if not story.samples:
        words = "No rollouts of training were logged (log.sample_rollouts_interval)."
        return element("p", words, class_="quiet")
    steps = [sample["step"] for sample in story.samples]
    sides = [_side(story.samples, step) for step in dict.fromkeys([min(steps), max(steps)])]
    return element(
        "details",
        element("summary", f"Rollouts that {story.label} was trained on"),
        element("div", *sides, class_="sides"),
    )


def _side(samples: Sequence[Mapping[str, Any]], step: int) -> Html:
    def each() -> Iterator[Html]:
        yield element("div", f"step {step}", class_="what")
        for sample in samples:
            if sample["step"] == step:
                details = sample.get("details", {})
                words = ", ".join(f"{key} {value}" for key, value in details.items())
                yield element("h3", words)
                yield _text(sample["prompt"])
                yield element("div", "goes on", class_="what")
                yield _text(sample["prefix"])

    return element("div", *each(), class_="side")
