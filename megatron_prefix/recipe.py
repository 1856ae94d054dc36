"""From a recipe's name to a resolved :class:`Recipe`, and its record in the run folder.

``recipe < YAML overlay < command line``: every setting goes through OmegaConf's structured merge,
so that a typo or a value of another type is refused with its key. Texts are taken as they stand:
``${...}`` in a system prompt is no interpolation, and YAML's ``off`` is no boolean for a text.
"""

import difflib
import hashlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_prefix.config import Recipe, TeacherServerConfig

RECORD_NAME = "recipe.yaml"
_YAML = (".yaml", ".yml")
_BOOLEANS = ("true", "false", "on", "off", "yes", "no")
_PACKAGE = Path(__file__).resolve().parent
# A wheel carries the recipes inside the package, a checkout beside it.
_SHIPPED = (_PACKAGE.parent / "recipes", _PACKAGE / "recipes")

_PLACES = (
    "tensor_model_parallel_size pipeline_model_parallel_size num_layers_in_first_pipeline_stage "
    "expert_model_parallel_size expert_tensor_parallel_size sequence_parallel "
    "recompute_granularity placement offload world_size"
).split()
_PLACES += [f"server.{each.name}" for each in fields(TeacherServerConfig) if each.name != "top_k"]
# Megatron has it and this project has not: what cuts activations instead.
_ABSENT = {"context_parallel_size": " No context parallelism here; use sequence_parallel=true"}
# What a resumed run may change: where it runs, how it is laid out, how long it trains, what it
# reports. Whatever is not listed identifies the run. The schedules of the prefix length and of the
# learning rate stretch with train.steps.
OUTSIDE_IDENTITY = frozenset(
    ("run", "checkpoint", "eval", "log")
    + ("train.steps", "train.micro_batch_size", "train.max_skipped_steps")
    + tuple(f"{model}.{key}" for model in ("student", "teacher") for key in _PLACES)
    + tuple(
        f"rollout.{key}"
        for key in (
            "server_urls",
            *("api_key_file", "api_key"),
            "num_servers",
            "device",
            "server_tensor_parallel_size",
            "max_total_tokens",
            "server_args",
            *("start_timeout_s", "request_timeout_s", "retries"),
            *("hang_timeout_s", "server_restarts", "sync_timeout_s"),
            *("weight_sync", "bucket_mib", "verify_weights_every"),
            "logprob_tolerance",
            "record",
        )
    )
    + ("loss.chunk_size", "optimizer.overlap_grad_reduce")
)


def load_recipe(source: str, overlay: str = "", overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe behind ``source``.

    ``source``: a Python file or an importable ``package.module`` with ``def recipe() -> Recipe``,
    the name of a file in ``recipes/``, or a run's recorded ``recipe.yaml``. ``overlay``: a YAML
    file. ``overrides``: ``section.key=value``, last one wins. ValueError, in one line, for whatever
    is not found, unknown or mistyped.
    """
    config = _lay(OmegaConf.structured(Recipe()), _leaves(asdict(_base_recipe(source))), source)
    if overlay:
        config = _lay(config, _leaves(_read_yaml(Path(overlay), _TextLoader)), overlay)
    config = _lay(config, map(_parse_override, overrides))
    return _finish(config)


def save_record(recipe: Recipe, folder: Path) -> Path:
    """Writes the resolved recipe into ``folder``, whole or not at all; ``load_record`` gives an
    equal one back."""
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / RECORD_NAME, folder / f".{RECORD_NAME}.partial"
    text = yaml.safe_dump(asdict(recipe), sort_keys=False)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
    return path


def load_record(path: Path) -> Recipe:
    """The recipe that ``save_record`` wrote; ValueError where it is none."""
    settings = _leaves(_read_yaml(path, yaml.SafeLoader))
    return _finish(_lay(OmegaConf.structured(Recipe()), settings, str(path)))


def identity(recipe: Recipe) -> dict[str, Any]:
    """The settings that make a run this run, by dotted key: all but ``OUTSIDE_IDENTITY``."""
    return {key: value for key, value in _leaves(asdict(recipe)) if _identifies(key, value)}


def _identifies(key: str, value: Any) -> bool:
    if key.endswith(".placement") and value == "server":  # top-k targets are others
        return True
    owner, _, place = key.partition(".")
    if owner == "teachers" and place.partition(".")[2] in _PLACES:
        return False
    return key not in OUTSIDE_IDENTITY and owner not in OUTSIDE_IDENTITY


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 of :func:`identity`, in hexadecimal."""
    return hashlib.sha256(json.dumps(identity(recipe), sort_keys=True).encode()).hexdigest()


def check_run_folder(folder: Path, recipe: Recipe) -> None:
    """ValueError where ``folder`` holds the run of another recipe; names the first difference."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"run folder {folder} is a file; set another run.name or run.output_dir")
    record = folder / RECORD_NAME
    if not record.exists():
        return
    theirs, ours = identity(load_record(record)), identity(recipe)
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        there, here = theirs.get(key, "nothing"), ours.get(key, "nothing")
        if there != here:
            raise ValueError(
                f"run folder {folder} holds another recipe's run: {key} is {there!r} there and "
                f"{here!r} here; give this run another run.name, or set {key} back"
            )


def factory_beside(source: str, name: str) -> Callable[[], Any] | None:
    """The function ``name`` of the file or module behind ``source``; None where it has none."""
    if Path(source).suffix in _YAML:
        return None
    found = getattr(_find_module(source)[0], name, None)
    return found if callable(found) else None


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
            return _import_by_name(source), source
        path = found[0]
    return _import_file(path), str(path)


def _import_by_name(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, TypeError, ValueError) as error:
        shipped = sorted({file.stem for folder in _SHIPPED for file in folder.glob("*.py")})
        raise ValueError(
            f"recipe {name!r} is neither a file, nor a name in recipes/, nor a module "
            f"({error}).{_did_you_mean(name, shipped)}"
        ) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"recipe file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"megatron_prefix_recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        raise ValueError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    return module


def _call_factory(module: ModuleType, source: str) -> Recipe:
    factory: Callable[[], Recipe] | None = getattr(module, "recipe", None)
    if not callable(factory):
        raise ValueError(f"{source} has no function recipe(); write `def recipe() -> Recipe:`")
    try:
        made = factory()
    except TypeError as error:  # a field that does not exist: Python's own "Did you mean" says so
        raise ValueError(f"recipe() of {source}: {error}") from error
    if not isinstance(made, Recipe):
        raise ValueError(f"recipe() of {source} returned {type(made).__name__}; it must be Recipe")
    return made


class _TextLoader(yaml.BaseLoader):
    """YAML whose scalars stay texts, for OmegaConf to convert by the field's type."""


def _read_yaml(path: Path, loader: type[yaml.BaseLoader] | type[yaml.SafeLoader]) -> dict[str, Any]:
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


def _parse_override(text: str) -> tuple[str, object]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"override {text!r} is not section.key=value; try train.steps=20")
    if _type_at(key) is str:
        return key, value
    try:
        return key, yaml.load(value, Loader=_TextLoader)
    except yaml.YAMLError as error:
        raise ValueError(_mistyped(key, value)) from error


def _leaves(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested sections, in their order."""
    for name, value in settings.items():
        key = f"{above}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _lay(config: DictConfig, settings: Iterable[tuple[str, Any]], origin: str = "") -> DictConfig:
    """``config`` with ``settings`` over it, the last of a key winning; errors name ``origin``."""
    try:
        checked = {key: _checked(key, value) for key, value in settings}
        return _merge(config, checked)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}" if origin else str(error)) from error


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


def _finish(config: DictConfig) -> Recipe:
    recipe = OmegaConf.to_object(config)
    assert isinstance(recipe, Recipe)
    return recipe


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
            hint = _ABSENT.get(name) or _did_you_mean(key, tuple(_keys(Recipe)))
            raise ValueError(f"unknown key {key!r}.{hint}")
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


def _did_you_mean(name: str, known: Sequence[str]) -> str:
    """ " Did you mean ...?" for a whole name, or for its last part under any section."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.75)
    last = name.rpartition(".")[2]
    near = near or [key for key in known if key.rpartition(".")[2] == last][:2]
    near = near or difflib.get_close_matches(name, known, n=2, cutoff=0.5)
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
