"""The house rules that a machine can hold: sizes, leftovers, recipes, what the README says."""

import ast
import re
import statistics
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from megatron_prefix.placement import resolve_world_size, world_layout
from megatron_prefix.recipe import load_recipe
from megatron_prefix.validate import validate

ROOT = Path(__file__).parents[2]
FOLDERS = ("megatron_prefix", "recipes", "tools", "tests", "benchmarks")
FILE_LINES = 350
MEDIAN_LINES, MOST_LINES, LONGEST_LINES = 15, 40, 80
# Split so that this file does not hold them.
LEFTOVERS = tuple(a + b for a, b in (("TO", "DO"), ("FIX", "ME"), ("XX", "X"), ("HA", "CK")))
FOREIGN_PATHS = tuple("/" + name for name in ("work/", "home/", "root/", "tmp/"))
TEXTS = (".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".cpp", ".sbatch")
RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def python_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def text_files() -> Iterator[Path]:
    """What the repository holds or would take in; ``git`` knows what it leaves out."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in names.splitlines():
        path = ROOT / name
        if path.is_file() and (path.suffix in TEXTS or path.name == "Makefile"):
            yield path


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions_of(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and name of each function, nested ones and methods included."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.end_lineno - node.lineno + 1, f"{path.relative_to(ROOT)}:{node.name}"


def test_no_file_is_longer_than_a_reader_holds() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert len(lengths) > 30
    too_long = {str(path): n for path, n in lengths.items() if n >= FILE_LINES}
    assert not too_long


def test_functions_are_short() -> None:
    sizes = sorted(size for path in python_files() for size in functions_of(path))
    lines = [size for size, _ in sizes]
    assert len(lines) > 300
    assert statistics.median(lines) < MEDIAN_LINES
    assert sum(n < MOST_LINES for n in lines) >= 0.9 * len(lines)
    assert not [size for size in sizes if size[0] > LONGEST_LINES]


def test_nothing_is_left_for_later() -> None:
    pattern = re.compile(rf"\b({'|'.join(LEFTOVERS)})\b")
    found = [
        f"{path.relative_to(ROOT)}:{i}"
        for path in text_files()
        for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]
    assert not found


def test_no_path_of_somebodys_machine_is_committed() -> None:
    # Not within a longer path, nor after a variable.
    pattern = re.compile(r"(?<![\w.~>)}*])(" + "|".join(FOREIGN_PATHS) + ")")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in text_files()
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_no_code_of_a_checkpoint_is_run_unless_a_recipe_says_so() -> None:
    """``rollout.server_args`` can; nothing here does."""
    pattern = re.compile(r"trust[_-]remote[_-]code(?!=False)")
    found = [
        str(path.relative_to(ROOT))
        for folder in ("megatron_prefix", "recipes", "tools", "slurm")
        for path in sorted((ROOT / folder).rglob("*.*"))
        if path.suffix in TEXTS and pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_a_batch_script_is_read_at_one_sitting() -> None:
    scripts = sorted((ROOT / "slurm").glob("*.sbatch"))
    assert [path.stem for path in scripts] == ["multi_node", "one_node"]
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) < 80
        assert not re.findall(r"^#SBATCH.*--(?:nodes=(?!1\b)|gpus)", text, flags=re.MULTILINE)


def is_stub(node: ast.AST) -> bool:
    raised = node.exc if isinstance(node, ast.Raise) else None
    name = raised.func if isinstance(raised, ast.Call) else raised
    return isinstance(name, ast.Name) and name.id == "NotImplementedError"


def swallows(node: ast.AST) -> bool:
    """A handler of everything that neither raises nor hands the error on."""
    if not isinstance(node, ast.ExceptHandler):
        return False
    everything = node.type is None or (
        isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
    )
    inside = list(ast.walk(node))
    passed_on = any(isinstance(inner, ast.Raise) for inner in inside) or any(
        isinstance(inner, ast.Attribute) and inner.attr == "set_exception" for inner in inside
    )
    return everything and not passed_on


@pytest.mark.parametrize("rule", [is_stub, swallows], ids=["stub", "swallowed exception"])
def test_the_package_holds_none(rule) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / "megatron_prefix").rglob("*.py"))
        for node in ast.walk(tree_of(path))
        if rule(node)
    ]
    assert not found


@pytest.mark.parametrize(
    ("code", "stub", "swallowed"),
    [
        ("raise NotImplementedError", True, False),
        ("raise NotImplementedError('later')", True, False),
        ("try:\n    f()\nexcept:\n    pass", False, True),
        ("try:\n    f()\nexcept Exception:\n    g()", False, True),
        ("try:\n    f()\nexcept BaseException:\n    g()\n    raise", False, False),
        ("try:\n    f()\nexcept OSError:\n    pass", False, False),
        ("try:\n    f()\nexcept Exception as e:\n    g.set_exception(e)", False, False),
    ],
)
def test_the_rules_see_what_they_should(code: str, stub: bool, swallowed: bool) -> None:
    nodes = list(ast.walk(ast.parse(code)))
    assert (any(map(is_stub, nodes)), any(map(swallows, nodes))) == (stub, swallowed)


def test_every_test_asserts() -> None:
    """Itself, through pytest.raises or warns, or through a call named ``assert_*``, ``check_*``,
    ``expect_*`` or ``verify``."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.name}"
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if not any(asserts(inner) for inner in ast.walk(node))
    ]
    assert not silent


def asserts(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("raises", "warns", "verify") or name.startswith(
        ("assert_", "check_", "expect_")
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_but_for_folders_to_fetch(path: Path) -> None:
    data = ROOT / "tests" / "assets" / "gsm8k_8.jsonl"
    sets = [
        words
        for section in ("data", "eval")
        for words in (f"{section}.path={data}", f"{section}.prompt_column=question")
    ]
    recipe = load_recipe(str(path), overrides=sets)
    world_size = resolve_world_size(recipe)
    world = world_layout(recipe, world_size)
    for replicas in (world.student.dp, world.teacher.dp):
        assert recipe.train.global_batch_size % (recipe.train.micro_batch_size * replicas) == 0
    models = (recipe.student, recipe.teacher)
    if not all(model.hf_path and Path(model.hf_path).is_dir() for model in models):
        # Settings are checked before folders, so nothing but a folder may be named.
        with pytest.raises(ValueError, match=r"^(student|teacher)\.hf_path[ =]"):
            validate(recipe)
    else:
        assert validate(recipe).world_size == world_size


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def test_the_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([a-z-]+)", readme))
    assert {"quickstart", "test"} <= named <= makefile_targets()
    assert {"env", "lint", "bench", "gpu-test"} <= makefile_targets()


def test_every_target_brings_its_environment() -> None:
    targets = re.findall(r"^([a-z-]+):(.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    without = {name for name, needs in targets if needs.split() != ["env"]}
    assert without == {"help", "env"}


def test_links_between_documents_lead_somewhere() -> None:
    broken = [
        f"{path.relative_to(ROOT)} -> {target}"
        for path in text_files()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
        if not (path.parent / target).exists()
    ]
    assert not broken


def test_the_script_of_the_package_is_the_command() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert settings["project"]["scripts"] == {"megatron-prefix": "megatron_prefix.cli:main"}
    assert settings["tool"]["ruff"]["lint"]["select"] == ["E", "F", "I", "B", "UP"]
