"""The page's tables: runs, ledger, phases, recipes, offline evaluations, events."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from megatron_prefix.config import Recipe
from megatron_prefix.evaluation.pass_at_k import wilson_interval
from megatron_prefix.report.comparison import training_seconds
from megatron_prefix.report.markup import Html, element, join, shorten, table, text
from megatron_prefix.report.story import RunStory, flatten, is_alarm
from megatron_prefix.report.tables import si
from megatron_prefix.run_files.account import PARTS
from megatron_prefix.run_files.history import EvaluationRecord
from megatron_prefix.run_files.progress import duration

_EVENTS = 60  # of a run that are shown, the newest
_NOTHING = "\u2013"
_OWN = ("run.name", "run.output_dir")  # differ between any two runs


def run_name(index: int, story: RunStory, several: bool) -> Html:
    chip = element("span", class_="chip", style=f"background: var(--run-{index % 8})")
    return element("span", chip if several else "", story.label, class_="run")


def tiles(story: RunStory) -> Html:
    """A single run in five figures."""
    history, account = story.history, story.account
    full = f"that would have cost {si(account.flops_full.total)}FLOP"
    evaluated = [e for e in history.evaluations if math.isfinite(e.accuracy)]
    shown = []
    if evaluated:
        first, last = evaluated[0], evaluated[-1]
        more = f"of {last.n} held-out prompts, {interval_words(last)}"
        value = f"{100 * first.accuracy:.1f} \u2192 {100 * last.accuracy:.1f}%"
        shown.append(("accuracy" if first is not last else "accuracy, once", value, more))
    total = f" of {story.total_steps}" if story.total_steps else ""
    shown += [
        ("training", f"{si(account.flops.total)}FLOP", "rollouts, teacher and student"),
        ("of full length", ratio_words(account.ratio), full),
        ("prefix tokens", f"{si_count(account.tokens['rollout'])}", "sampled and trained on"),
        ("steps", f"{story.steps}{total}", f"in {duration(training_seconds(history)[-1])} of work"),
    ]
    return element("div", *(_tile(*each) for each in shown), class_="tiles")


def _tile(what: str, value: str, more: str) -> Html:
    return element(
        "div",
        element("div", what, class_="what"),
        element("div", value, class_="value"),
        element("div", more, class_="more"),
        class_="tile",
    )


def interval_words(evaluation: EvaluationRecord) -> str:
    low, high = wilson_interval(evaluation.accuracy * evaluation.n, evaluation.n)
    return f"95%: {100 * low:.1f} to {100 * high:.1f}"


def ratio_words(ratio: float) -> str:
    return f"{ratio:.2f}\u00d7" if math.isfinite(ratio) else _NOTHING


def si_count(value: int) -> str:
    """A count of tokens: 12, 3.4 k, 5.6 M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return str(value)


def runs_table(stories: Sequence[RunStory]) -> Html:
    headings = ("run", "policy", "steps", "accuracy before", "after", "95% interval",
                "truncated", "FLOP", "of full length", "tokens", "time", "alarms")  # fmt: skip
    rows = [_run_row(i, story, len(stories) > 1) for i, story in enumerate(stories)]
    return table(headings, rows, "llrrrrrrrrrr")


def _run_row(index: int, story: RunStory, several: bool) -> list[object]:
    history, account = story.history, story.account
    found = [e for e in history.evaluations if math.isfinite(e.accuracy) and e.n]
    accuracy: list[object] = [_NOTHING] * 4
    if found:
        last = found[-1]
        before = f"{100 * found[0].accuracy:.1f}%" if found[0].step == 0 else _NOTHING
        after = f"{100 * last.accuracy:.1f}%" if last.step else _NOTHING
        share = Html(f"{100 * last.truncated / last.n:.1f}%")
        if last.unparsable:
            words = f"{last.unparsable} unparsable"
            share = join([share, element("span", words, class_="quiet")])
        accuracy = [before, after, interval_words(last).removeprefix("95%: "), share]
    total = f"/{story.total_steps}" if story.total_steps else ""
    alarms = len(story.alarms)
    return [
        run_name(index, story, several),
        policy_words(story.settings),
        f"{story.steps}{total}",
        *accuracy,
        si(account.flops.total),
        ratio_words(account.ratio),
        si_count(account.tokens["rollout"]),
        duration(training_seconds(history)[-1]),
        element("span", alarms, class_="bad" if alarms else ""),
    ]


def policy_words(settings: Mapping[str, Any]) -> str:
    policy = settings.get("prefix.policy")
    if policy is None:
        return _NOTHING
    low, high = settings.get("prefix.min_length"), settings.get("prefix.max_length")
    return f"{policy}, {low} of {high}" if policy == "fixed" else f"{policy}, {low} to {high}"


def ledger_table(stories: Sequence[RunStory]) -> Html:
    """FLOPs by part, a row a run; the counterfactual is training's alone."""
    headings = ("run", *PARTS, "all", "training at full length", "ratio")
    rows = []
    for index, story in enumerate(stories):
        account = story.account
        cells = [_spent(account.by_part[part], account.tokens.get(part)) for part in PARTS]
        everything = _spent(account.total, sum(account.tokens.values()))
        ratio = [si(account.flops_full.total), ratio_words(account.ratio)]
        rows.append([run_name(index, story, len(stories) > 1), *cells, everything, *ratio])
    return table(headings, rows, "lr")


def _spent(flops: float, tokens: int | None) -> Html:
    """FLOPs over the tokens sampled for them."""
    known = si(flops) if math.isfinite(flops) else "not counted"
    if not tokens:
        return text(known if flops else _NOTHING)
    return join([known, element("span", f"{si_count(tokens)} tokens", class_="quiet")])


def phase_rows(stories: Sequence[RunStory]) -> Html:
    """Mean seconds of a step by phase, and each phase's share of all seconds."""
    phases = list(dict.fromkeys(phase for s in stories for phase in s.history.seconds))
    rows = []
    for index, story in enumerate(stories):
        seconds = story.history.seconds
        total = sum(float(values.sum()) for values in seconds.values()) or float("nan")
        cells = [
            f"{seconds[p].mean():.3f} s, {seconds[p].sum() / total:.0%}" if p in seconds else ""
            for p in phases
        ]
        rows.append([run_name(index, story, len(stories) > 1), *cells])
    return table(("run", *(f"{phase}: mean s, share" for phase in phases)), rows, "lr")


def recipe_table(stories: Sequence[RunStory]) -> Html:
    """What the recipes differ in; of a single run, what it sets off the defaults."""
    known = [story for story in stories if story.settings]
    if not known:
        return element("p", "No run has a record of its recipe.", class_="quiet")
    if len(known) == 1:
        return join([_off_defaults(known[0].settings, "default")])
    keys = dict.fromkeys(key for story in known for key in story.settings)
    differing = [
        key
        for key in keys
        if key not in _OWN and len({repr(story.settings.get(key)) for story in known}) > 1
    ]
    if not differing:
        return element("p", "The recipes are alike but for the run's name.", class_="quiet")
    rows = [
        [element("code", key), *(_value(story.settings.get(key, _NOTHING)) for story in known)]
        for key in differing
    ]
    several = len(stories) > 1
    names = [run_name(stories.index(story), story, several) for story in known]
    alike = {key: value for key, value in known[0].settings.items() if key not in differing}
    common = element(
        "details",
        element("summary", "Settings that the runs share and that are not the defaults"),
        _off_defaults(alike, "default"),
    )
    return join([table(("setting", *names), rows), common])


def _off_defaults(settings: Mapping[str, Any], heading: str) -> Html:
    defaults = dict(flatten(asdict(Recipe())))
    rows = [
        [element("code", key), _value(value), _value(defaults.get(key, _NOTHING))]
        for key, value in settings.items()
        if key not in _OWN and _plain(value) != _plain(defaults.get(key))
    ]
    return table(("setting", "this run", heading), rows)


def _plain(value: Any) -> str:
    """Tuples and lists are one in YAML."""
    return repr(list(value) if isinstance(value, tuple) else value)


def _value(value: Any) -> Html:
    return element("code", "(empty)" if value in ("", [], ()) else shorten(str(value), 300))


def offline_table(stories: Sequence[RunStory]) -> Html:
    """What ``megatron-prefix eval`` found afterwards; nothing where it was not asked."""
    rows: list[list[object]] = []
    for index, story in enumerate(stories):
        for found in story.offline:
            low, high = found["interval"]
            asked = found["samples_per_prompt"]
            passed = found["pass_at"].get(str(asked), {}).get("value")
            rows.append(
                [run_name(index, story, len(stories) > 1), found["name"], found["problems"]]
                + [f"avg@{asked} {100 * found['accuracy']:.1f}%"]
                + [f"{100 * low:.1f} to {100 * high:.1f}"]
                + [_NOTHING if asked == 1 or passed is None else f"{100 * passed:.1f}%"]
                + [f"{100 * found['truncation_rate']:.1f}%", found["unparsable"]]
            )
    if not rows:
        return Html()
    headings = ("run", "evaluation", "problems", "accuracy", "95% interval", "pass@n",
                "truncated", "unparsable")  # fmt: skip
    title = element("h3", "Evaluated afterwards, by megatron-prefix eval")
    return join([title, table(headings, rows, "llr")])


def events_section(stories: Sequence[RunStory]) -> Html:
    parts: list[Html] = []
    for index, story in enumerate(stories):
        parts.append(element("h3", run_name(index, story, len(stories) > 1)))
        if story.notes:
            parts.append(element("ul", *(element("li", n) for n in story.notes), class_="notes"))
        skipped = int(story.history.skipped.sum())
        if skipped:
            words = f"{skipped} steps made no update: their loss or gradient was not finite."
            parts.append(element("p", words, class_="bad"))
        parts.append(_events(story))
    return join(parts)


def _events(story: RunStory) -> Html:
    if not story.events:
        return element("p", "No event was logged.", class_="quiet")
    latest = story.events[-_EVENTS:]
    rows = [
        [
            _when(event.get("time")),
            event.get("step", ""),
            element("span", event.get("kind", ""), class_="bad" if is_alarm(event) else ""),
            shorten(str(event.get("message", "")), 600),
        ]
        for event in latest
    ]
    shown = table(("time (UTC)", "step", "kind", "what happened"), rows, "lrl")
    left = len(story.events) - len(latest)
    return join([element("p", f"{left} earlier events are left out.") if left else "", shown])


def _when(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return ""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
