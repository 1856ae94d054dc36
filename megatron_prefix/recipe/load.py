"""From a recipe's name to a resolved :class:`Recipe`: ``recipe < YAML overlay < command line``."""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

from megatron_prefix.config import Recipe
from megatron_prefix.recipe.record import RECORD_NAME, load_record
from megatron_prefix.recipe.settings import (
    TextLoader,
    did_you_mean,
    finish,
    lay,
    leaves,
    parse_override,
    read_yaml,
)
from megatron_prefix.users_code import call_users

_YAML = (".yaml", ".yml")
_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries the recipes inside the package, a checkout beside it.
_SHIPPED = (_PACKAGE.parent / "recipes", _PACKAGE / "recipes")


class NoRecipe(ValueError):
    """There is no recipe of that name."""


def load_recipe(source: str, overlay: str = "", overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe behind ``source``.

    ``source``: a Python file or an importable ``package.module`` with ``def recipe() -> Recipe``,
    the name of a file in ``recipes/``, or a run's recorded ``recipe.yaml``. ``overlay``: a YAML
    file. ``overrides``: ``section.key=value``, last one wins. ValueError, in one line, for whatever
    is not found, unknown or mistyped.
    """
    config = lay(OmegaConf.structured(Recipe()), leaves(asdict(_base_recipe(source))), source)
    if overlay:
        config = lay(config, leaves(read_yaml(Path(overlay), TextLoader)), overlay)
    config = lay(config, map(parse_override, overrides))
    return finish(config)


def factory_beside(source: str, name: str) -> Callable[[], Any] | None:
    """The function ``name`` of the file or module behind ``source``; None where it has none."""
    if Path(source).suffix in _YAML:
        return None
    found = getattr(_find_module(source)[0], name, None)
    return partial(call_users, source, f"{name}()", found) if callable(found) else None


def write_own_data(source: str) -> None:
    """Calls ``write_data()`` of the recipe's file, where it has one: its data set is made by it."""
    write = factory_beside(source, "write_data")
    if write:
        write()


def _base_recipe(source: str) -> Recipe:
    if Path(source).suffix in _YAML:
        return load_record(Path(source))
    return _call_factory(*_find_module(source))


def _find_module(source: str) -> tuple[ModuleType, str]:
    """And what to call it in messages."""
    path = Path(source)
    if path.suffix != ".py":
        named = [folder / f"{source}.py" for folder in (Path("recipes"), *_SHIPPED)]
        found = [file for file in named if file.is_file()]
        if not found:
            _refuse_what_is_no_module(path)
            return _import_by_name(source), source
        path = found[0]
    return _import_file(path), str(path)


def _refuse_what_is_no_module(path: Path) -> None:
    """ValueError for a folder that is no package, and for a file of another kind."""
    if (path / RECORD_NAME).is_file():
        raise ValueError(f"{path} is a run's folder; give {path / RECORD_NAME}")
    if path.is_dir() and not (path / "__init__.py").is_file():
        raise NoRecipe(f"{path} is a folder; give a recipe's file, a run's {RECORD_NAME} or a name")
    if path.is_file():
        raise ValueError(f"recipe {path} must end in .py or .yaml")


def _import_by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, TypeError, ValueError) as error:
        shipped = sorted({file.stem for folder in _SHIPPED for file in folder.glob("*.py")})
        raise NoRecipe(
            f"recipe {name!r} is neither a file, nor a name in recipes/, nor a module "
            f"({error}).{did_you_mean(name, shipped)}"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"recipe file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"megatron_prefix_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    call_users(f"recipe {path}", "the file", spec.loader.exec_module, module)
    return module


def _call_factory(module: ModuleType, source: str) -> Recipe:
    factory: Callable[[], Recipe] | None = getattr(module, "recipe", None)
    if not callable(factory):
        raise ValueError(f"{source} has no function recipe(); write `def recipe() -> Recipe:`")
    # Of a field that does not exist Python's own "Did you mean" says so.
    made = call_users(source, "recipe()", factory)
    if not isinstance(made, Recipe):
        raise ValueError(f"recipe() of {source} returned {type(made).__name__}; it must be Recipe")
    return made
