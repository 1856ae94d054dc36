"""The settings that the documentation shows for policies and modes are settings that hold."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prefix.recipe import load_recipe
from megatron_prefix.validate.limits import check_settings
from megatron_prefix.validate.prefix import check_prefix

ROOT = Path(__file__).parents[2]
CHOICE, POLICIES, MODES = (
    ROOT / "docs" / name for name in ("prefix-policies.md", "prefix-reference.md", "modes.md")
)
PAPERS = (
    "2602.15260 2605.31490 2605.28396 2605.07804 2605.13643 2606.22600 2603.05433 2603.11137"
).split()


def commands(page: Path) -> Iterator[list[str]]:
    """The overrides of each ``megatron-prefix train RECIPE`` in the page's blocks."""
    for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL):
        for command in block.split("megatron-prefix train ")[1:]:
            recipe, *overrides = shlex.split(command, comments=True)
            if recipe == "RECIPE":
                yield overrides


def relatives() -> dict[str, list[str]]:
    """The table of papers: each with the settings of its row."""
    page = POLICIES.read_text().split("## Published relatives")[1].split("##")[0]
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| ")][1:]
    shown = {row[0].strip().split()[-1]: re.findall(r"`(.*?=.*?)`", row[1]) for row in rows}
    return {paper: shlex.split(settings[0]) for paper, settings in shown.items()}


def check(overrides: list[str]) -> None:
    recipe = load_recipe("quickstart", overrides=overrides)
    check_settings(recipe)
    check_prefix(recipe)


@pytest.mark.parametrize("paper", PAPERS)
def test_each_published_relative_is_named_with_settings_that_hold(paper: str) -> None:
    overrides = relatives()[paper]
    assert overrides
    if paper == "2602.15260":  # a length for real models
        overrides.append("prefix.max_length=1024")
    check(overrides)


@pytest.mark.parametrize("page", [CHOICE, POLICIES, MODES], ids=lambda page: page.name)
def test_commands_on_the_pages_hold(page: Path) -> None:
    shown = list(commands(page))
    assert len(shown) >= 2
    for overrides in shown:
        check(overrides)
