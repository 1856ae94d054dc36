"""A user's own class out of a setting."""

import importlib
from typing import Any


def import_by_path(key: str, path: str) -> Any:
    """The object that ``package.module:Name`` names; ValueError that names ``key``."""
    module_name, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{key}={path!r} cannot be imported ({error}); "
            "it must be package.module:Class on the Python path; of a file in this folder, set "
            "PYTHONPATH=$PWD"
        ) from error
