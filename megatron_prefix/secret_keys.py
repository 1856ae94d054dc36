"""Keys and tokens: a recipe names the variable that holds one, and never holds one itself.

``${oc.env:NAME}`` is kept as it stands in the recorded recipe, and is read where the key is used.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any
from urllib.parse import urlsplit

from megatron_prefix.config import Recipe

_REFERENCE = re.compile(r"\$\{oc\.env:([A-Za-z_][A-Za-z0-9_]*)\}")
# What services write before the keys that they give out: OpenAI and its kin, Hugging Face, GitHub,
# GitLab, Slack, AWS, Google.
_KEYS = re.compile(
    r"(?<![A-Za-z0-9])(?:(sk-)(?=[A-Za-z_-]*[0-9])[A-Za-z0-9_-]{20,}|(hf_)[A-Za-z0-9]{30,}"
    r"|(gh[opsu]_)[A-Za-z0-9]{30,}|(github_pat_)[A-Za-z0-9_]{40,}|(glpat-)[A-Za-z0-9_-]{20,}"
    r"|(xox[abpr]-)[A-Za-z0-9-]{20,}|(AKIA)[A-Z0-9]{16}|(AIza)[A-Za-z0-9_-]{35})"
)
_KEY_ARGUMENTS = ("--api-key", "--admin-api-key", "--ssl-keyfile-password")
_SECRET_NAME = re.compile(r"(^|_)((KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?|TOKEN)$", re.IGNORECASE)


def referenced(text: str) -> str:
    """The variable that ``text`` refers to; empty where it is no reference."""
    found = _REFERENCE.fullmatch(text)
    return found[1] if found else ""


def resolve(key: str, text: str) -> str:
    """The secret that the setting ``key`` refers to; empty where it is not set.

    ValueError, without its value, for a secret itself, and for a variable that is not there.
    """
    if not text:
        return ""
    name = referenced(text)
    if not name:
        raise ValueError(
            f"{key} must not hold a key, which would be recorded: export it as a variable and set "
            f"{key}='${{oc.env:NAME}}'"
        )
    if not os.environ.get(name):
        raise ValueError(f"{key}=${{oc.env:{name}}}: there is no {name} in the environment")
    return os.environ[name]


def names_a_secret(name: str) -> bool:
    """Whether a variable is called like one: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY."""
    return bool(_SECRET_NAME.search(name))


def key_prefix(text: str) -> str:
    """What a key within ``text`` begins with; empty where none is seen."""
    found = _KEYS.search(text)
    return next(filter(None, found.groups())) if found else ""


def check_secrets(recipe: Recipe) -> None:
    """ValueError, which never shows the value, where the recipe holds a secret, or refers to one
    that is not here."""
    rollout = recipe.rollout
    resolve("rollout.api_key", rollout.api_key)
    if rollout.api_key and rollout.api_key_file:
        raise ValueError(
            "rollout.api_key and rollout.api_key_file are two ways to say one; drop one"
        )
    _check_servers("rollout.server_args", rollout.server_args)
    _check_addresses("rollout.server_urls", rollout.server_urls, "rollout.api_key='${oc.env:NAME}'")
    teachers = {f"teachers.{name}": teacher for name, teacher in recipe.teachers.items()}
    for section, teacher in {"teacher": recipe.teacher, **teachers}.items():
        _check_servers(f"{section}.server.args", teacher.server.args)
        key_file = f"{section}.server.api_key_file"
        _check_addresses(f"{section}.server.urls", teacher.server.urls, key_file)
    for key, text in _texts(recipe):
        if begin := key_prefix(text):
            raise ValueError(
                f"{key} holds what looks like a key ({begin}...), and would be recorded; export it "
                "as a variable, which every process of the run gets"
            )


def _check_servers(key: str, arguments: Iterable[str]) -> None:
    for argument in arguments:
        option = argument.partition("=")[0]
        if option in _KEY_ARGUMENTS:
            raise ValueError(
                f"{key}: {option} would be on a command line, for all to read; leave "
                "it out: each server that a run starts gets a random key of its own"
            )


def _check_addresses(key: str, urls: Iterable[str], setting: str) -> None:
    for url in urls:
        if urlsplit(url).password or urlsplit(url).username:
            raise ValueError(
                f"{key}: the one at {urlsplit(url).hostname} holds a user or a password; give the "
                f"key by {setting}"
            )


def _texts(section: Any, above: str = "") -> Iterator[tuple[str, str]]:
    """Every text of the recipe with its dotted key."""
    if isinstance(section, str):
        yield above.rstrip("."), section
    elif isinstance(section, tuple | list):
        for item in section:
            yield from _texts(item, above)
    elif isinstance(section, dict):
        for name, item in section.items():
            yield from _texts(item, f"{above}{name}.")
    elif is_dataclass(section):
        for field in fields(section):
            yield from _texts(getattr(section, field.name), f"{above}{field.name}.")
