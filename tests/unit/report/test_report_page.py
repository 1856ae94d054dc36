"""The report's page: everything in it, nothing of it markup by accident, whatever is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from megatron_prefix.cli import main
from megatron_prefix.report import markup, sections, texts
from megatron_prefix.report.page import write_report
from megatron_prefix.report.story import load_stories
from megatron_prefix.run_files.jsonl import read_records
from tests.run_folders import write_run, write_whole_run

HOSTILE = "</div><script>document.title='pwned'</script><b onclick=x>\x00\u202e\ud800&amp;"
VOID = {"meta", "br", "hr", "img", "col"}


class Tree(HTMLParser):
    """Fails where an element is closed that is not open; keeps names, attributes and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def page_of(*runs: Path) -> Tree:
    return Tree(write_report(list(runs), runs[0] / "out").read_text(encoding="utf-8"))


def test_two_runs_side_by_side(tmp_path: Path) -> None:
    first = write_whole_run(tmp_path / "first")
    second = write_whole_run(tmp_path / "second", steps=8)
    tree = page_of(first, second)
    assert tree.names.count("svg") == 4 + 2 * 3
    for words in ("2 runs compared", "first", "second", "linear, 2 to 20", "it is 7", "what is 7?",
                  "8 of 12 steps: still going", "step 3 had loss nan", "GFLOP",
                  "2 unparsable"):  # fmt: skip
        assert words in tree.text
    names = {path.name for path in (first / "out").glob("*.png")}
    assert {
        "accuracy.png",
        "learning.png",
        "cost.png",
        "time.png",
        "kl-2.png",
        "probes-1.png",
    } <= names
    with Image.open(first / "out" / "accuracy.png") as image:
        assert len(image.convert("RGB").getcolors(2**24) or []) > 50


def test_the_page_fetches_and_runs_nothing(tmp_path: Path) -> None:
    tree = page_of(write_whole_run(tmp_path / "run"))
    assert not {"script", "link", "iframe", "object", "base"} & set(tree.names)
    links = [
        value or "" for name, value in tree.attributes if name in ("src", "href", "xlink:href")
    ]
    assert links and all(link.startswith(("#", "data:image/png")) for link in links)
    assert not [name for name, _ in tree.attributes if name.startswith("on")]
    ids = [value for name, value in tree.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_texts_of_models_and_people_are_never_markup(tmp_path: Path) -> None:
    run = write_whole_run(tmp_path / "_$x$<i>&run", words=HOSTILE.replace("\ud800", ""))
    lines = list(read_records(run / "samples.jsonl"))
    (run / "samples.jsonl").write_text(json.dumps(lines[0] | {"prefix": HOSTILE}) + "\n")
    tree = page_of(run)
    assert "script" not in tree.names and "b" not in tree.names and "i" not in tree.names
    shown = "</div><script>document.title='pwned'</script><b onclick=x>\u2400\u27e8U+202E\u27e9"
    assert tree.text.count(shown) > 10
    assert f"{shown}\ufffd&amp;" in tree.text
    assert "_$x$<i>&run" in tree.text


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    run = write_whole_run(tmp_path / "run")
    lost = ("evaluations", "evaluations.jsonl", "probes.jsonl", "events.jsonl", "samples.jsonl")
    for name in (*lost, "recipe.yaml"):
        (run / name).rename(tmp_path / name)
    text = page_of(run).text
    for told in (
        "No run was evaluated",
        "No probes (log.probe_interval=0)",
        "No event was logged.",
        "No rollouts of training were logged",
        "how long the run was meant to be is not known",
        "No run kept answers",
        "No run has a record of its recipe",
    ):
        assert told in text


def test_a_line_that_is_being_written_is_left_out_and_told(tmp_path: Path) -> None:
    run = write_whole_run(tmp_path / "run", total=20)
    (before,) = load_stories([run])
    assert before.notes == ("12 of 20 steps: still going, or stopped early.",)
    names = ("metrics", "evaluations", "probes", "events", "samples")
    for name in names:
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 13, "loss"')
    (after,) = load_stories([run])
    assert after.notes[1:] == tuple(
        f"The last line of {name}.jsonl is half written and was left out." for name in names
    )
    assert after.steps == 12 and after.probes == before.probes
    assert "half written" in page_of(run).text


def test_one_step_without_anything_else_is_a_report(tmp_path: Path) -> None:
    tree = page_of(write_run(tmp_path / "one", {}, steps=1))
    assert tree.names.count("svg") == 5  # accuracy's place has words
    assert "No run was evaluated" in tree.text


def test_a_single_run_shows_what_it_set_and_two_what_they_differ_in(tmp_path: Path) -> None:
    first, second = write_whole_run(tmp_path / "a"), write_whole_run(tmp_path / "b", total=99)
    alone = Tree(sections.recipe_table(load_stories([first]))).text
    assert re.search(r"prefix\.max_length\s+20\s+1024", alone)
    both = Tree(sections.recipe_table(load_stories([first, second]))).text
    assert re.search(r"train\.steps\s+12\s+99", both)
    assert "run.name" not in both


def test_problems_that_became_right_come_first_and_the_page_says_in_which_order(
    tmp_path: Path,
) -> None:
    (story,) = load_stories([write_whole_run(tmp_path / "run")])
    assert texts.choose_rows(story.answers) == [1, 3, 5, 7, 0, 2, 4, 6]
    words = "up to 4 that became right, up to 2 that became wrong, then others."
    assert words in texts.answers_section([story])


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", {})
    empty = tmp_path / "empty"
    empty.mkdir()
    for words, message in (
        ([str(tmp_path / "nowhere")], "nowhere is no folder"),
        ([str(empty)], "holds no step in metrics.jsonl"),
        ([str(run), f"{run}/../run"], "is named twice"),
    ):
        assert main(["report", *words]) == 2
        told = capsys.readouterr().err
        assert message in told and told.count("\n") == 1
    assert not (run / "report").exists()
    assert main(["report", str(empty), str(tmp_path / "nowhere")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and "none of the 2 named is a run's folder" in told[-1]
    assert main(["report", str(empty), str(run)]) == 0
    told = capsys.readouterr()
    assert told.out.strip() == str(run / "report" / "index.html")
    assert told.err.count("\n") == 1 and "warning: left out: " in told.err
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report" / "index.html")


def test_runs_of_one_name_keep_theirs_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", {}) for name in ("a", "b")]
    assert [story.label for story in load_stories(runs)] == ["a/run", "b/run"]


def test_markup_escapes_all_but_markup() -> None:
    inner = markup.element("b", "1 < 2", title='"')
    assert inner == '<b title="&quot;">1 &lt; 2</b>'
    assert markup.element("p", inner, "<b>") == f"<p>{inner}&lt;b&gt;</p>"
    assert markup.shorten("abcdef", 4) == "abcd\u2026 (2 characters more)"
    assert markup.visible("a\n\tb\x1b\x85") == "a\n\tb\u241b\u27e8U+0085\u27e9"
