"""What a command of ``megatron-prefix`` consists of."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

ABOUT_RECIPES = """\
RECIPE is a Python file with `def recipe() -> Recipe`, the name of one in recipes/, an importable
package.module, or the recipe.yaml of a run's folder, which repeats that run's settings.
Settings are laid over it in this order: recipe < --overlay FILE < section.key=value ...
"""


@dataclass(frozen=True)
class Command:
    summary: str  # its line in the list of commands
    examples: str  # the end of its --help
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]  # to an exit code; imports what it needs
    about: str = ""  # stands in its --help, below the summary


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a file, a name, a module or a record")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="settings, typed; the last wins",
    )
    parser.add_argument("--overlay", default="", metavar="FILE", help="a YAML file of settings")
