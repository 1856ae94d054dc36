"""A user's own class or function out of a setting: found, and called so that it names itself."""

import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def import_by_path(key: str, path: str, kind: str = "Class") -> Any:
    """The object that ``package.module:Name`` names; ValueError that names ``key``, whatever its
    module raises."""
    module_name, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:
        raise ValueError(
            f"{key}={path!r} cannot be imported ({_one_line(error)}); "
            f"it must be package.module:{kind} on the Python path; of a file in this folder, set "
            "PYTHONPATH=$PWD"
        ) from error


def call_users[T](setting: str, call: str, function: Callable[..., T], *arguments: object) -> T:
    """``function(*arguments)`` of a user's code; whatever it raises becomes a ValueError of one
    line: the ``setting`` that brought the code, the ``call`` and the place. It keeps the cause."""
    try:
        return function(*arguments)
    except Exception as error:
        raise ValueError(f"{setting}: {call} raised {_one_line(error)}{_place(error)}") from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


def _place(error: Exception) -> str:
    if isinstance(error, SyntaxError):  # its own text has it
        return ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f" ({Path(last.filename).name}, line {last.lineno})"
