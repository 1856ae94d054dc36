"""Recipes: three layers in their order, one-line refusals, and records that replay exactly."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prefix.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    PrefixConfig,
    Recipe,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_prefix.recipe import (
    OUTSIDE_IDENTITY,
    check_run_folder,
    fingerprint,
    identity,
    load_recipe,
    load_record,
    save_record,
)
from tests.refused import refusal_of

SHIPPED = sorted((Path(__file__).parents[2] / "recipes").glob("*.py"))
RECIPE = """
from megatron_prefix.config import DataConfig, PrefixConfig, Recipe, TrainConfig

def recipe() -> Recipe:
    return Recipe(
        data=DataConfig(path="prompts.jsonl", system_prompt="Cost: ${x} \\\\${y} off"),
        prefix=PrefixConfig(options={"rate": 2}),
        train=TrainConfig(steps=7, seed=3),
    )
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(RECIPE)
    return path


def refusal(source: str, overlay: str = "", overrides: tuple[str, ...] = ()) -> str:
    return refusal_of(load_recipe, source, overlay, overrides)


def test_layers_lie_over_each_other_in_order(file: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "more.yaml"
    overlay.write_text("train: {steps: 8, global_batch_size: 16}\nrollout: {server_args: [--x, 1]}")
    recipe = load_recipe(str(file), str(overlay), ["train.steps=9", "train.steps=10"])
    assert (recipe.train.steps, recipe.train.global_batch_size, recipe.train.seed) == (10, 16, 3)
    assert recipe.rollout.server_args == ("--x", "1")
    assert recipe.data.path == "prompts.jsonl"
    assert recipe.prefix.options == {"rate": 2.0}


def test_texts_are_taken_as_they_stand(file: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "more.yaml"
    overlay.write_text("student: {fp8: {format: off}, hf_path: 1e3}\nrun: {name: null}")
    recipe = load_recipe(str(file), str(overlay), ["data.split=007", "data.name=a=${b}"])
    assert recipe.data.system_prompt == r"Cost: ${x} \${y} off"
    assert (recipe.student.fp8.format, recipe.student.hf_path) == ("off", "1e3")
    assert (recipe.run.name, recipe.data.split, recipe.data.name) == ("null", "007", "a=${b}")


def test_overrides_are_typed(file: Path) -> None:
    recipe = load_recipe(
        str(file),
        overrides=[
            "optimizer.lr=1e-3",
            "rollout.server_urls=[http://a:1, http://b:2]",
            "student.sequence_parallel=true",
            "prefix.options.rate=5",
            "prefix.options.more=0.5",
        ],
    )
    assert recipe.optimizer.lr == 1e-3
    assert recipe.rollout.server_urls == ("http://a:1", "http://b:2")
    assert recipe.student.sequence_parallel is True
    assert recipe.prefix.options == {"rate": 5.0, "more": 0.5}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "student.tensor_model_paralel_size=4",
            "Did you mean 'student.tensor_model_parallel_size'",
        ),
        ("tensor_model_parallel_size=4", "'student.tensor_model_parallel_size'"),
        ("studnt.hf_path=x", "Did you mean 'student.hf_path'"),
        ("zzzz=1", "Known: run, student, teacher"),
        ("foo.bar=1", "unknown key 'foo.bar'. Known: run, student, teacher"),
        ("trian.steps=1", "Did you mean 'train.steps'"),
        ("train.steps.more=1", "unknown key 'train.steps.more'"),
        ("train.steps=abc", "train.steps='abc' must be a whole number (int)"),
        ("train.steps=2.5", "train.steps='2.5' must be a whole number (int)"),
        ("train.steps=", "must be a whole number (int)"),
        ("optimizer.lr=fast", "optimizer.lr='fast' must be a number (float)"),
        ("student.sequence_parallel=3", "must be true or false (bool)"),
        ("rollout.server_urls=http://a", "must be a list of texts, like [a,b]"),
        ("rollout.server_urls=[a", "must be a list of texts, like [a,b]"),
        ("prefix.options=3", "names with numbers"),
        ("prefix.options.rate=x", "prefix.options.rate='x' must be a number (float)"),
        ("student.fp8=on", "set one of its keys, like student.fp8.format"),
        ("student.hf_path=???", "must be a text (str)"),
        ("train.steps", "is not section.key=value"),
    ],
)
def test_a_bad_override_is_refused_in_one_line(file: Path, override: str, message: str) -> None:
    assert message in refusal(str(file), overrides=(override,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {stepz: 3}", "Did you mean 'train.steps'"),
        ("train: {steps: many}", "train.steps='many' must be a whole number (int)"),
        ("train: [1, 2]", "train is a section"),
        ("- train", "must hold sections"),
        ("train: {steps: 3", "is no YAML"),
    ],
)
def test_a_bad_overlay_is_refused_with_its_name(
    file: Path, tmp_path: Path, text: str, message: str
) -> None:
    overlay = tmp_path / "more.yaml"
    overlay.write_text(text)
    told = refusal(str(file), str(overlay))
    assert message in told
    assert str(overlay) in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no function recipe()"),
        ("def recipe(): return 3", "returned int"),
        ("def recipe(:", "the file raised SyntaxError: invalid syntax (bad.py, line 1)"),
        ("def recipe():\n    return 1 / 0", "ZeroDivisionError: division by zero (bad.py, line 2)"),
        ("import no_such_module", "No module named 'no_such_module'"),
        (
            "from megatron_prefix.config import TrainConfig\ndef recipe(): TrainConfig(stepz=1)",
            "unexpected keyword argument 'stepz'",
        ),
        (
            "from megatron_prefix.config import *\n"
            "def recipe(): return Recipe(train=TrainConfig(steps='ten'))",
            "train.steps='ten' must be a whole number (int)",
        ),
        (
            "from megatron_prefix.config import *\ndef recipe(): return Recipe(train=3)",
            "train is a section",
        ),
    ],
)
def test_a_bad_recipe_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.py"
    path.write_text(text)
    told = refusal(str(path))
    assert message in told
    assert str(path) in told


def test_a_recipe_is_found_by_file_name_and_module(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "recipes"
    named.mkdir()
    (named / "small.py").write_text(RECIPE)
    package = tmp_path / "some_package_of_mine"
    package.mkdir()
    (package / "distil.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_recipe("small") == load_recipe(str(file))
    assert load_recipe("some_package_of_mine.distil") == load_recipe(str(file))


@pytest.mark.parametrize("source", ["nowhere", "no/such.py", "no.yaml", "", ".relative"])
def test_a_recipe_that_is_nowhere_is_named(source: str) -> None:
    assert source in refusal(source)


def test_a_record_is_a_recipe(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(file), overrides=["train.steps=20", "rollout.logprob_tolerance=inf"])
    record = save_record(recipe, tmp_path / "run")
    assert load_record(record) == recipe
    assert load_recipe(str(record)) == recipe
    assert load_recipe(str(record), overrides=["train.steps=21"]).train.steps == 21
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["recipe.yaml"]


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)
TRICKY = st.sampled_from(["null", "off", "1e3", "${a}", r"\${a}", r"\\${", "a: b", "#", " x ", "'"])


@settings(deadline=None, max_examples=50)
@given(TEXTS | TRICKY, st.floats(allow_nan=False), st.lists(TEXTS | TRICKY, max_size=3))
def test_records_keep_any_value(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float, texts: list[str]
) -> None:
    recipe = Recipe(
        data=DataConfig(system_prompt=text),
        optimizer=OptimizerConfig(lr=number),
        prefix=PrefixConfig(options={"rate": number}),
        rollout=RolloutConfig(server_args=tuple(texts)),
    )
    record = save_record(recipe, tmp_path_factory.getbasetemp() / "any")
    assert load_record(record) == recipe


def test_every_shipped_recipe_loads_and_replays(tmp_path: Path) -> None:
    for path in SHIPPED:
        recipe = load_recipe(str(path))
        assert load_record(save_record(recipe, tmp_path / path.stem)) == recipe, path
        assert recipe != Recipe(), path


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("train: {stepz: 3}")
    with pytest.raises(ValueError, match=r"recipe.yaml: unknown key 'train.stepz'"):
        load_record(path)


def keys_of(settings: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield f"{above}{name}"
            yield from keys_of(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def test_what_lies_outside_the_identity_exists() -> None:
    assert set(keys_of(asdict(Recipe()))) >= OUTSIDE_IDENTITY


def test_fingerprint_moves_with_what_is_learned_and_not_with_where() -> None:
    base = Recipe()
    for other in (
        replace(base, run=RunConfig(name="b", world_size=8)),
        replace(base, student=ModelConfig(tensor_model_parallel_size=2)),
        replace(base, train=TrainConfig(steps=999)),
        replace(base, rollout=RolloutConfig(server_urls=("http://a:1",))),
    ):
        assert fingerprint(other) == fingerprint(base)
    for other in (
        replace(base, student=ModelConfig(hf_path="elsewhere")),
        replace(base, train=TrainConfig(seed=1)),
        replace(base, prefix=PrefixConfig(options={"rate": 1.0})),
        replace(base, optimizer=OptimizerConfig(lr=1.0)),
    ):
        assert fingerprint(other) != fingerprint(base)
    assert "train.seed" in identity(base)


def test_a_run_folder_refuses_another_recipe(tmp_path: Path) -> None:
    recipe = Recipe(train=TrainConfig(seed=4))
    check_run_folder(tmp_path / "new", recipe)
    save_record(recipe, tmp_path)
    check_run_folder(tmp_path, replace(recipe, train=replace(recipe.train, steps=500)))
    with pytest.raises(ValueError, match=r"train.seed is 4 there and 5 here"):
        check_run_folder(tmp_path, replace(recipe, train=replace(recipe.train, seed=5)))
    with_option = replace(recipe, prefix=PrefixConfig(options={"rate": 1.0}))
    with pytest.raises(ValueError, match=r"prefix.options.rate is 'nothing' there and 1.0 here"):
        check_run_folder(tmp_path, with_option)


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.write_text("")
    with pytest.raises(ValueError, match="is a file"):
        check_run_folder(path, Recipe())
    with pytest.raises(ValueError, match=f"{path} is a file; set another run.name"):
        check_run_folder(path / "deeper" / "run", Recipe())


def test_a_run_folder_that_cannot_be_made_is_refused() -> None:
    """In /proc nobody may make one, root included, whatever its permissions say."""
    with pytest.raises(ValueError, match="run folder /proc/.* cannot be written: .*; set another"):
        save_record(Recipe(), Path("/proc/self/run"))
