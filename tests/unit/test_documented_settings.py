"""The settings that the documentation and ``--help`` show are settings that hold."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prefix.cli import _COMMANDS, _EXAMPLES, parse
from megatron_prefix.commands.launch_arguments import cluster_of
from megatron_prefix.config import Recipe
from megatron_prefix.jobs.cluster import Cluster, check_cluster
from megatron_prefix.plan.command import plan_recipe
from megatron_prefix.plan.sizes import ModelSizes
from megatron_prefix.recipe import factory_beside, load_recipe, write_own_data
from megatron_prefix.validate import validate
from megatron_prefix.validate.limits import check_settings
from megatron_prefix.validate.prefix import check_prefix

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
POLICIES = ROOT / "docs" / "prefix-reference.md"
PAPERS = (
    "2602.15260 2605.31490 2605.28396 2605.07804 2605.13643 2606.22600 2603.05433 2603.11137"
).split()
NAMES = ("plan", "launch", "prepare", "advise", "train")
EXAMPLES = {"the whole": _EXAMPLES} | {name: c.examples for name, c in _COMMANDS.items()}
# Files that the examples name and nobody has; the machine's has what 4 ranks and 32 rollouts want.
FILES = {
    "cluster.yaml": "train: {micro_batch_size: 16}",
    "written.jsonl": '{"prompt": "p", "answer": "a", "answer_ids": [1]}\n',
    "teacher.key": "k",
    "sawtooth.py": re.findall(r"```python\n(.*?)```", POLICIES.read_text(), re.DOTALL)[-1],
}


def shown_in(text: str) -> Iterator[list[str]]:
    """The words of each such command, without comments, pipes and explanations; one that stands for
    others (``...``, ``[a | b]``, ``a|b``) is none."""
    begin = rf"megatron-prefix +({'|'.join(NAMES)}) +"
    _, *parts = re.split(begin, re.sub(r"\\\n +", "", text))
    for name, rest in zip(parts[::2], parts[1::2], strict=True):
        line, *more = rest.split("\n")
        while line.count('"') % 2:  # a text goes on in the next line
            line += "\n" + more.pop(0)
        line = re.split(r" {2,}| \| ", line)[0]
        if not re.search(r"\.\.\.|(?<!=)\[|\w\|\w", line):
            yield [name, *shlex.split(line, comments=True)]


def shown_on(page: Path) -> Iterator[list[str]]:
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.DOTALL | re.M):
        yield from shown_in(block)


def relatives() -> dict[str, list[str]]:
    """The table of papers: each with the settings of its row."""
    page = POLICIES.read_text().split("## Published relatives")[1].split("##")[0]
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")][1:]
    shown = {row[0].strip().split()[-1]: re.findall(r"`(.*?=.*?)`", row[1]) for row in rows}
    return {paper: shlex.split(settings[0]) for paper, settings in shown.items()}


def check(recipe: Recipe) -> None:
    check_settings(recipe)
    check_prefix(recipe)


def check_command(words: list[str]) -> None:
    """All of it for a recipe that is named; for RECIPE or a run's its settings, and for a user's
    own, whose lengths nobody knows, their names and types."""
    arguments = parse(words)
    source = str(getattr(arguments, "recipe", "") or arguments.source)
    named = source.removeprefix("recipes/").removesuffix(".py")
    shipped = (ROOT / "recipes" / f"{named}.py").is_file()
    name = str(ROOT / "recipes" / f"{named}.py") if shipped else "quickstart"
    recipe = load_recipe(name, arguments.overlay, arguments.overrides)
    if shipped or not source.endswith(".py"):
        check(recipe)
    if shipped:
        write_own_data(name)
        read = ModelSizes()
        validate(recipe, read, sizes_only=not read.all_here(recipe))
    if words[0] == "launch":
        arguments.recipe = name
        check_cluster(cluster_of(arguments), recipe)
    if shipped and any(word.startswith("run.gpu_memory_gib=") for word in words):
        cluster = factory_beside(name, "cluster")
        fit = plan_recipe(recipe, cluster() if cluster else Cluster(), quick=True).fit
        assert fit and not fit.fits and fit.changes, "what the pages show it for"


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("paper", PAPERS)
def test_each_published_relative_is_named_with_settings_that_hold(paper: str) -> None:
    overrides = relatives()[paper]
    assert overrides
    if paper == "2602.15260":  # a length for real models
        overrides.append("prefix.max_length=1024")
    check(load_recipe("quickstart", overrides=overrides))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_the_pages_hold(page: Path) -> None:
    for words in shown_on(page):
        check_command(words)


@pytest.mark.parametrize("name", EXAMPLES)
def test_commands_in_help_hold(name: str) -> None:
    for words in shown_in(EXAMPLES[name]):
        check_command(words)


def test_no_command_is_overlooked() -> None:
    shown = {page.name: len(list(shown_on(page))) for page in PAGES}
    least = {"configuration.md": 1, "plan.md": 2, "teachers.md": 6, "modes.md": 5,
             "prefix-policies.md": 6, "slurm.md": 2, "operations.md": 2}  # fmt: skip
    for name, count in least.items():
        assert shown[name] >= count, (name, shown)
    told = {name: len(list(shown_in(text))) for name, text in EXAMPLES.items()}
    least = {"the whole": 3, "plan": 4, "train": 4, "launch": 6, "prepare": 1, "advise": 4}
    for name, count in least.items():
        assert told[name] >= count, (name, told)
