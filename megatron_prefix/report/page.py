"""The report of one or several runs: a page that needs nothing beside itself, and its pictures."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

from megatron_prefix.report import comparison, of_one_run, sections, texts
from megatron_prefix.report.markup import Html, element, join
from megatron_prefix.report.picture import Picture
from megatron_prefix.report.story import RunStory, load_stories

PAGE = "index.html"
# Nothing is fetched and nothing runs, even where a text got through as markup.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_PARTS = (
    ("accuracy", "Accuracy and its price"),
    ("learning", "Learning"),
    ("cost", "FLOPs"),
    ("time", "Time"),
    ("runs", "KL by position"),
    ("answers", "Answers side by side"),
    ("recipes", "Recipes"),
    ("events", "Events"),
)


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Writes ``index.html`` and a PNG of every picture into ``output``; returns the page's path.

    Raises ValueError as :func:`~megatron_prefix.report.story.load_stories` does.
    """
    stories = load_stories(folders)
    pictures = _pictures(stories)
    output.mkdir(parents=True, exist_ok=True)
    for picture in pictures.values():
        picture.save(output)
    page = output / PAGE
    page.write_text(_page(stories, pictures), encoding="utf-8")
    return page


def _pictures(stories: Sequence[RunStory]) -> dict[str, Picture]:
    made = [
        comparison.accuracy_picture(stories),
        comparison.learning_picture(stories),
        comparison.cost_picture(stories),
        comparison.time_picture(stories),
    ]
    for number, story in enumerate(stories, start=1):
        made.append(of_one_run.kl_picture(story, number))
        made.append(of_one_run.growth_picture(story, number))
        if story.probes:
            made.append(of_one_run.probes_picture(story, number))
    return {picture.name: picture for picture in made}


def _page(stories: Sequence[RunStory], pictures: dict[str, Picture]) -> str:
    names = ", ".join(story.label for story in stories)
    style = Html(files("megatron_prefix.report").joinpath("page.css").read_text(encoding="utf-8"))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{names}: prefix distillation"),
        Html(f"<style>{style}</style>"),
    )
    body = element("body", _header(stories), element("main", *_main(stories, pictures)), _footer())
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _header(stories: Sequence[RunStory]) -> Html:
    title = stories[0].label if len(stories) == 1 else f"{len(stories)} runs compared"
    links = element("nav", *(element("a", name, href=f"#{key}-part") for key, name in _PARTS))
    return element("header", element("h1", title), _lead(stories), links)


def _lead(stories: Sequence[RunStory]) -> Html:
    """What was distilled into what, where the runs agree on it."""
    known = [story.settings for story in stories if story.settings]
    told = []
    for owner in ("student", "teacher"):
        names = {Path(str(s.get(f"{owner}.hf_path", ""))).name for s in known}
        if len(names) == 1 and (name := names.pop()):
            told.append(f"{owner} {name}")
    if len(stories) == 1 and known:
        told.append(f"policy {sections.policy_words(known[0])}")
    return element("p", "On-policy prefix distillation. " + ", ".join(told), class_="lead")


def _main(stories: Sequence[RunStory], pictures: dict[str, Picture]) -> Iterable[Html]:
    if len(stories) == 1:
        yield sections.tiles(stories[0])
    yield sections.runs_table(stories)
    evaluated = any(story.history.evaluations for story in stories)
    show = {name: picture.html() for name, picture in pictures.items()}
    bodies = {
        "accuracy": [
            show["accuracy"] if evaluated else _none_evaluated(),
            sections.offline_table(stories),
        ],
        "learning": [show["learning"]],
        "cost": [show["cost"], sections.ledger_table(stories), *_of_runs("growth", stories, show)],
        "time": [show["time"], sections.phase_rows(stories)],
        "runs": [*_of_runs("kl", stories, show), *_of_runs("probes", stories, show)],
        "answers": [
            texts.answers_section(stories),
            *(texts.training_rollouts(story) for story in stories),
        ],
        "recipes": [sections.recipe_table(stories)],
        "events": [sections.events_section(stories)],
    }
    for key, name in _PARTS:
        yield element("section", element("h2", name), *bodies[key], id=f"{key}-part")


def _none_evaluated() -> Html:
    words = "No run was evaluated: set eval.path in the recipe, or ask megatron-prefix eval."
    return element("p", words, class_="quiet")


def _of_runs(kind: str, stories: Sequence[RunStory], show: dict[str, Html]) -> Iterable[Html]:
    """Each run's picture of a kind, under its name where there are several."""
    for number, story in enumerate(stories, start=1):
        picture = show.get(f"{kind}-{number}")
        if picture is None:
            continue
        if len(stories) > 1:
            yield element("h3", sections.run_name(number - 1, story, True))
        yield picture


def _footer() -> Html:
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    words = f"Written by megatron-prefix report, {now}. The pictures lie beside this page as PNG."
    return join([element("footer", words)])
