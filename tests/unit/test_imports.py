"""Holds docs/architecture.md's directions: walks every import of the package by its syntax tree.

Imports inside functions count, those under TYPE_CHECKING do not. A new module goes into ``LAYERS``,
a package as a whole where all of its modules are of one layer.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "megatron_prefix"
ROOT = Path(__file__).parents[2] / PACKAGE
# Runs inside SGLang's server process, and is imported by nothing of ours.
IN_THE_SERVER = "rollout.cpu_engine"

# From the bottom up: a module imports modules of its own layer and of those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("config", "types", "exit_codes", "modes", "users_code")
    + ("commands.command", "run_files.whole_file"),
    # Pure parts and thin edges: no Megatron, no knowledge of the loop.
    ("recipe", "jobs", "layout", "hf_folder", "safetensors_files", "tasks")
    + ("secret_keys", "placement")
    + ("data", "prefix", "rollout", "batch", "loss", "orders", "context_shares", "advice", "report")
    + ("commands.advise_arguments", "commands.report_arguments")
    + ("run_files.account", "run_files.jsonl", "run_files.kl_grid", "run_files.progress")
    + ("run_files.tb_writer", "run_files.log", "run_files.history")
    + ("health.metrics_page", "health.phases", "health.slow_phases", "health.step_times")
    + ("health.watchdog",)
    + ("evaluation.evaluate", "evaluation.pass_at_k", "evaluation.run", "evaluation.scorers"),
    ("health.alarms", "weighing.prefix_sums", "weighing.token_weights"),
    ("mcore",),
    ("teachers.served", "teachers.serve", "teachers.server_files"),
    ("validate", "preflight", "plan", "doctor", "commands.eval_arguments", "evaluation.job"),
    ("teacher", "student", "publisher")
    + ("weighing.agreement", "weighing.entropy_choice", "weighing.reweigh", "weighing.token_kl"),
    ("teachers.lagged",),
    ("evaluation.beside",),
    ("teachers.server", "teachers.reach"),
    ("probes", "saves", "conductor", "trouble", "trainer")
    + ("teachers.loop", "weighing.step_metrics"),
    ("supplies", "world", "assemble", "worker"),
    ("agent",),
    ("commands.launch_arguments", "launch", "launcher", "die_with_parent"),
    ("commands.advise_job", "commands.of_recipes", "commands.of_runs"),
    ("cli",),
)
# What may import these packages of others.
EDGES = {
    "megatron": ("mcore",),
    "transformer_engine": ("mcore",),
    "sglang": (IN_THE_SERVER,),
    "sgl_kernel": (IN_THE_SERVER,),
    "nemo_run": ("launch",),
}
# What a module may import of ours, where the layers alone would allow more.
ONLY = {"recipe": ("config", "recipe", "run_files.whole_file", "users_code")}
ONLY |= {"jobs.cluster": ("config", "modes", "secret_keys"), "users_code": ()}
ONLY |= {"loss": ("loss",), "secret_keys": ("config",), "modes": ("config",)}
ONLY |= {"launch": ("config", "recipe", "jobs.cluster", "exit_codes", "jobs.starts")}
# Importing these may bring Megatron along; importing any other must not.
NEEDS_MEGATRON = ("mcore", "supplies", "teacher", "student", "publisher", "trainer", "assemble")
NEEDS_MEGATRON += ("world", "saves", "weighing.agreement", "weighing.token_kl")
NEEDS_MEGATRON += ("weighing.reweigh", "weighing.entropy_choice")
NEEDS_MEGATRON += ("teachers.lagged", "teachers.loop", "teachers.server", "teachers.reach")
WITHOUT_TORCH = ("cli", "config", "doctor", "launcher", "layout", "placement", "plan", "prefix")
WITHOUT_TORCH += ("preflight", "recipe", "teachers.served", "types", "validate")


@dataclass(frozen=True)
class Import:
    """One import of module ``by``; of ours without the package's name."""

    by: str
    of: str
    ours: bool
    at_import: bool  # False: inside a function, run when it is called


def listed() -> tuple[str, ...]:
    return tuple(name for layer in LAYERS for name in layer)


@cache
def part(module: str) -> str:
    """The entry of LAYERS that a module belongs to; empty where there is none."""
    return max((name for name in listed() if within(module, (name,))), key=len, default="")


def top(module: str) -> str:
    return module.partition(".")[0]


def only_says_what_it_holds(path: Path) -> bool:
    """An ``__init__`` of a package whose modules have layers of their own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return path.name == "__init__.py" and len(tree.body) == 1 and bool(ast.get_docstring(tree))


def within(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its name below the package."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        names = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    found.pop("")
    return found


@cache
def imports() -> tuple[Import, ...]:
    return tuple(
        found
        for module, path in modules().items()
        for found in imports_of(module, ast.parse(path.read_text(encoding="utf-8")))
    )


def imports_of(by: str, tree: ast.AST, at_import: bool = True) -> Iterator[Import]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports_of(by, node, at_import and not inside)
        for name in imported_names(by, node):
            ours = name == PACKAGE or name.startswith(f"{PACKAGE}.")
            yield Import(by, name.removeprefix(f"{PACKAGE}.") if ours else name, ours, at_import)


def imported_names(by: str, node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level:  # in the server the stand-ins are packages of their own
        assert within(by, (IN_THE_SERVER,)), f"{by}: relative import: {ast.unparse(node)}"
        return []
    assert node.module
    below = [f"{node.module}.{alias.name}" for alias in node.names]
    known = {f"{PACKAGE}.{module}" for module in modules()}
    return [name if name in known else node.module for name in below]


def ours() -> list[Import]:
    return [i for i in imports() if i.ours and not within(i.by, (IN_THE_SERVER,))]


def test_every_module_has_a_layer() -> None:
    names = listed()
    assert len(names) == len(set(names))
    # Where modules of a package are listed, all are: no other layer is meant for a new one.
    assert [name for name in names if within(name.rpartition(".")[0], names)] == []
    without = [module for module in modules() if not part(module)]
    assert [module for module in without if not only_says_what_it_holds(modules()[module])] == []
    assert {"config", "mcore", "cli", "teachers.served"} <= {part(module) for module in modules()}


def test_every_name_of_the_lists_is_there() -> None:
    allowed = {name for names in ONLY.values() for name in names}
    named = {*listed(), *ONLY, *allowed, *NEEDS_MEGATRON, *WITHOUT_TORCH}
    assert {name for name in named if not any(within(m, (name,)) for m in modules())} == set()


def test_imports_point_downwards() -> None:
    height = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    upward = [i for i in ours() if height[part(i.of)] > height[part(i.by)]]
    assert upward == []
    assert any(i.by == "trainer" and part(i.of) == "mcore" for i in ours())


def test_no_module_is_needed_by_what_it_needs() -> None:
    graph: dict[str, set[str]] = {module: set() for module in modules()}
    for found in ours():
        # A package's __init__ and its members may name each other through the package.
        if found.at_import and not found.by.startswith(f"{found.of}."):
            graph[found.by].add(found.of)
    try:
        order = tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {error.args[1]}")
    assert set(order) >= set(modules())


@pytest.mark.parametrize("package", sorted(EDGES))
def test_packages_at_the_edges_stay_there(package: str) -> None:
    outside = [
        i
        for i in imports()
        if top(i.of) == package and not i.ours and not within(i.by, EDGES[package])
    ]
    assert outside == []


@pytest.mark.parametrize("module", sorted(ONLY))
def test_some_modules_know_little_of_the_package(module: str) -> None:
    assert [i for i in ours() if within(i.by, (module,)) and not within(i.of, ONLY[module])] == []


def test_nothing_imports_what_runs_in_the_server() -> None:
    assert [i for i in imports() if i.ours and within(i.of, (IN_THE_SERVER,))] == []


def test_megatron_is_needed_by_few() -> None:
    """Follows what is run at import, the ``__init__`` of a package above a module included."""
    needs: dict[str, set[str]] = {module: set() for module in modules()}
    for found in imports():
        if found.at_import:
            needs[found.by].add(found.of if found.ours else f"other:{top(found.of)}")
    for module in needs:
        above, _, _ = module.rpartition(".")
        needs[module] |= {above} & set(modules())

    def reaches_megatron(module: str, seen: set[str]) -> bool:
        if module in seen:
            return False
        seen.add(module)
        return "other:megatron" in needs[module] or any(
            reaches_megatron(n, seen) for n in needs[module] if n in needs
        )

    heavy = {module for module in modules() if reaches_megatron(module, set())}
    assert "trainer" in heavy
    assert {module for module in heavy if not within(module, NEEDS_MEGATRON)} == set()


def test_light_modules_come_without_torch() -> None:
    there = [f"{PACKAGE}.{module}" for module in WITHOUT_TORCH if module in modules()]
    script = (
        f"import {', '.join(there)}, sys; print(sorted({{'torch', 'megatron'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import megatron.core", [Import("x", "megatron.core", False, True)]),
        ("def f():\n    import torch", [Import("x", "torch", False, False)]),
        ("if TYPE_CHECKING:\n    import torch", []),
        ("from megatron_prefix import config", [Import("x", "config", True, True)]),
        ("from megatron_prefix.config import Recipe", [Import("x", "config", True, True)]),
        (
            "class A:\n    from megatron_prefix.mcore import fp8",
            [Import("x", "mcore.fp8", True, True)],
        ),
    ],
)
def test_the_walk_sees_every_kind_of_import(source: str, expected: list[Import]) -> None:
    assert list(imports_of("x", ast.parse(source))) == expected
