"""Settings by dotted keys, typed.

Every one goes through OmegaConf's structured merge, so that a typo or a value of another type is
refused with its key. Texts are taken as they stand: ``${...}`` in a system prompt is no
interpolation, and YAML's ``off`` is no boolean for a text.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_prefix.config import Recipe

_BOOLEANS = ("true", "false", "on", "off", "yes", "no")


class TextLoader(yaml.BaseLoader):
    """YAML whose scalars stay texts, for OmegaConf to convert by the field's type."""


def read_yaml(path: Path, loader: type[yaml.BaseLoader] | type[yaml.SafeLoader]) -> dict[str, Any]:
    """The sections of a file; ValueError where it cannot be read or holds none."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold sections like `train:`, not a {type(content).__name__}")
    return content


def parse_override(text: str) -> tuple[str, object]:
    """Key and value of ``section.key=value``; ValueError for an unknown key, and for no YAML."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"override {text!r} is not section.key=value; try train.steps=20")
    if _type_at(key) is str:
        return key, value
    try:
        return key, yaml.load(value, Loader=TextLoader)
    except yaml.YAMLError as error:
        raise ValueError(_mistyped(key, value)) from error


def leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested sections, in their order."""
    for name, value in settings.items():
        key = f"{above}{name}"
        if isinstance(value, dict):
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def lay(config: DictConfig, settings: Iterable[tuple[str, Any]], origin: str = "") -> DictConfig:
    """``config`` with ``settings`` over it, the last of a key winning; errors name ``origin``."""
    try:
        checked = {key: _checked(key, value) for key, value in settings}
        return _merge(config, checked)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}" if origin else str(error)) from error


def finish(config: DictConfig) -> Recipe:
    recipe = OmegaConf.to_object(config)
    assert isinstance(recipe, Recipe)
    return recipe


def _checked(key: str, value: Any) -> Any:
    """``value`` if OmegaConf's merge will convert or refuse it by the type at ``key``."""
    wanted = _type_at(key)
    # A section takes no value; OmegaConf takes any number for a boolean, and its word for
    # "missing" for anything.
    section = is_dataclass(wanted) or get_origin(wanted) is dict
    if section or value == "???" or (wanted is bool and str(value).lower() not in _BOOLEANS):
        raise ValueError(_mistyped(key, value))
    return value


def _merge(config: DictConfig, settings: Mapping[str, Any]) -> DictConfig:
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        here = nested
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = _literal(value)
    try:
        merged = OmegaConf.merge(config, nested)
    except OmegaConfBaseException as error:
        key = str(error.full_key).partition("[")[0]
        raise ValueError(_mistyped(key, settings[key])) from error
    assert isinstance(merged, DictConfig)
    return merged


def _literal(value: Any) -> Any:
    """``value`` with OmegaConf's interpolations escaped: in its grammar a backslash before ``${``
    escapes it, and backslashes before that one count double."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + r"\${", value)
    if isinstance(value, list | tuple):
        return [_literal(item) for item in value]
    return value


def _type_at(key: str) -> Any:
    """The annotated type at a dotted key; ValueError with the nearest keys where there is none."""
    here: Any = Recipe
    for name in key.split("."):
        hints = _hints(here) if isinstance(here, type) and is_dataclass(here) else {}
        if get_origin(here) is dict:
            here = get_args(here)[1]
        elif name in hints:
            here = hints[name]
        else:
            raise ValueError(f"unknown key {key!r}.{_near_keys(key)}")
    return here


@cache
def _hints(section: type) -> dict[str, Any]:
    return get_type_hints(section)


def _keys(section: Any, above: str = "") -> Iterator[str]:
    hints = _hints(section)
    for field in fields(section):
        key = f"{above}{field.name}"
        yield key
        if is_dataclass(hints[field.name]):
            yield from _keys(hints[field.name], f"{key}.")


def _near_keys(key: str) -> str:
    """Under a section that does not exist, a key that only looks a little alike is a wild guess:
    the sections are named instead."""
    section, dot, _ = key.partition(".")
    known = tuple(_keys(Recipe))
    return did_you_mean(key, known, guess=not dot or section in known)


def did_you_mean(name: str, known: Sequence[str], *, guess: bool = True) -> str:
    """ " Did you mean ...?" for a whole name, or for its last part under any section; else the
    ``known`` names without a dot. ``guess``: what is alike by half will do too."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.75)
    last = name.rpartition(".")[2]
    near = near or [key for key in known if key.rpartition(".")[2] == last][:2]
    if guess and not near:
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    if near:
        return f" Did you mean {' or '.join(map(repr, near))}?"
    top = [key for key in known if "." not in key]
    return f" Known: {', '.join(top)}" if top else ""


def _mistyped(key: str, value: object) -> str:
    wanted = _type_at(key)
    if is_dataclass(wanted):
        first = fields(wanted)[0].name
        return f"{key}={value!r}: {key} is a section; set one of its keys, like {key}.{first}"
    expected = {
        int: "a whole number (int)",
        float: "a number (float)",
        bool: "true or false (bool)",
        str: "a text (str)",
        tuple: "a list of texts, like [a,b]",
        dict: "names with numbers, like {a: 1}",
    }[get_origin(wanted) or wanted]
    return f"{key}={value!r} must be {expected}"
