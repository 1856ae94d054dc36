"""Advice from pilots whose signal lies where the test put it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_prefix.advice import advise as advising
from megatron_prefix.advice.advise import Costs, advise, block, knee, overrides, shortest
from megatron_prefix.advice.pilot import Pilot, read_pilot
from megatron_prefix.cli import main
from megatron_prefix.commands.advise_job import pilot_of
from megatron_prefix.config import AnchoredConfig, LogConfig, ModelConfig, PrefixConfig, Recipe
from megatron_prefix.modes import needs_rollouts, needs_written
from megatron_prefix.prefix import ModelShape, build_policy
from megatron_prefix.prefix.flops import rollout_flops
from megatron_prefix.recipe import load_recipe, save_record
from megatron_prefix.run_files.log import RunLog
from megatron_prefix.tasks import sort_chain
from megatron_prefix.validate import validate
from tests.run_folders import metrics, probe

SHAPE = ModelShape(2, 64, 4, 4, 16, 2 * 192, 46)
EARLY = np.array([4.0, 3.0, 2.0] + [0.05] * 17)
LATE = EARLY[::-1].copy()
BASE = PrefixConfig("linear", 2, 20)


def pilot(*kl: np.ndarray, rollouts: int = 64, **other: object) -> Pilot:
    tokens = np.full((len(kl), len(kl[0])), rollouts)
    made = Pilot("a test", 0, np.stack(kl), tokens, 14.0, 0, {"rollout": 2.0, "sync": 1.0}, 20.0)
    return replace(made, **other)  # type: ignore[arg-type]


def advice(of: Pilot, share: float = 0.0, policy: str = "") -> advising.Advice:
    return advise(of, Costs(of, SHAPE, SHAPE), share, BASE, 16, policy)


def test_the_knee_and_the_shares_of_a_curve() -> None:
    assert knee(EARLY) == 3
    assert [shortest(EARLY, share) for share in (0.4, 0.7, 0.9, 0.99)] == [1, 2, 3, 19]
    assert shortest(np.ones(10), 0.8) == 8  # exactly, whatever the sums round to
    assert advice(pilot(EARLY), share=0.9).length == 3


def test_a_signal_that_lies_early_asks_for_a_short_prefix_with_anchors() -> None:
    found = advice(pilot(EARLY, EARLY))
    assert (found.prefix.policy, found.prefix.min_length, found.prefix.max_length) == (
        "anchored", 3, 20
    )  # fmt: skip
    assert found.warnings == () and found.spread == (3, 3)
    assert found.concentration == pytest.approx(9 / EARLY.sum() - 3 / 20)
    full = rollout_flops(SHAPE, SHAPE, 14, 20).total
    short = rollout_flops(SHAPE, SHAPE, 14, 3).total
    assert found.flops == pytest.approx((7 * short + full) / (8 * full))
    seconds = {option.length: option.seconds for option in found.options}
    assert seconds[20] == 1.0
    assert seconds[3] == pytest.approx((2.0 * 3 / 20 + 1.0) / 3.0)


def test_a_signal_that_lies_late_is_told_and_full_length_advised() -> None:
    found = advice(pilot(LATE))
    assert (found.prefix.policy, found.prefix.min_length) == ("fixed", 20)
    assert found.flops == 1.0
    assert "the signal lies late" in found.warnings[0]
    assert advice(pilot(np.ones(20))).prefix.min_length == 20


@pytest.mark.parametrize(
    ("of", "policy", "told"),
    [
        (pilot(EARLY, rollouts=8), "", "thin evidence: 8 rollouts; take 32 or more"),
        (pilot(EARLY, unfinished=9), "", "9 of 64 rollouts did not end within 20 tokens"),
        (pilot(EARLY, unfinished=-1), "", "64 of 64 rollouts are as long as the limit; if they"),
        (pilot(EARLY, step=40), "", "had taken 40 steps"),
        (pilot(EARLY), "fixed", "lost its tail"),
    ],
)
def test_what_weakens_the_advice_is_told(of: Pilot, policy: str, told: str) -> None:
    (warning,) = advice(of, policy=policy).warnings
    assert told in warning


def test_shorter_rollouts_save_less() -> None:
    tokens = np.array([[64] * 4 + [16] * 16])
    of = pilot(EARLY, tokens=tokens)
    assert of.lengths == [(4, 48), (20, 16)]
    costs = Costs(of, SHAPE, SHAPE)
    assert costs.flops(4).total == pytest.approx(64 * rollout_flops(SHAPE, SHAPE, 14, 4).total)
    assert costs.ratios([4])[0] > Costs(pilot(EARLY), SHAPE, SHAPE).ratios([4])[0]


@pytest.mark.parametrize("policy", advising.POLICIES)
def test_the_block_and_the_overrides_load(policy: str) -> None:
    found = advice(pilot(EARLY), policy=policy)
    names = {"PrefixConfig": PrefixConfig, "AnchoredConfig": AnchoredConfig}
    names |= {kind.__name__: kind for kind in (type(BASE.linear), type(BASE.late))}
    pasted = eval(f"dict({block(found.prefix)})", names)["prefix"]
    loaded = load_recipe("quickstart", overrides=overrides(found.prefix)).prefix
    for prefix in (pasted, loaded):
        lengths = [build_policy(prefix, 16).length(step) for step in range(16)]
        assert lengths == [build_policy(found.prefix, 16).length(step) for step in range(16)]


def run_folder(folder: Path, probed: bool, length: int = 4) -> Path:
    model = ModelConfig(hf_path=str(sort_chain.model_folder("student_a")))
    save_record(Recipe(student=model, teacher=model, prefix=PrefixConfig("fixed", 4, 20)), folder)
    log = LogConfig(tensorboard=False, probe_interval=1)
    with RunLog(folder, log, 3, console=Console(quiet=True)) as run:
        if probed:
            run.probe(probe(0))
        for step in (1, 2, 3):
            run.step(metrics(step, length, 1.0))
            if probed:
                run.probe(probe(step))
    return folder


def test_a_run_is_read_by_its_probes_or_else_its_full_steps(tmp_path: Path) -> None:
    recipe = Recipe(prefix=PrefixConfig("fixed", 4, 20))
    probed = run_folder(tmp_path / "probed", True)
    assert read_pilot(probed, recipe).source == "probe after step 0"
    later = read_pilot(probed, recipe, 2)
    assert (later.step, later.rollouts, later.max_length) == (2, 8, 20)
    full = read_pilot(run_folder(tmp_path / "full", False, length=20), recipe)
    assert (full.source, full.rollouts) == ("3 full-length steps from step 1", 24)
    assert full.mass.shape == (3, 20) and full.mass[:, -1].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="neither a probe .* nor steps of prefix.max_length=20"):
        read_pilot(run_folder(tmp_path / "short", False), recipe)


def test_the_command_prints_a_table_a_block_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run", True)
    assert main(["advise", str(run)]) == 0
    shown = capsys.readouterr().out
    assert len(re.findall(r"\u2502 +advised \d+ \u2502", shown)) == 1
    assert "Lengths: the advised one, the shortest that hold 50%, 75%," in shown
    assert "signal held" in shown and "prefix=PrefixConfig(" in shown
    assert "thin evidence: 8 rollouts" in shown
    assert (run / "advice.png").read_bytes().startswith(b"\x89PNG")
    assert main(["advise", str(run), "--json", "--share", "0.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["share"] == 0.5 and told["pilot"] == "probe after step 0"
    assert f"prefix.min_length={told['length']}" in told["overrides"]


@pytest.mark.parametrize(
    "given",
    [
        ["mode.name=off_policy", "mode.written.path={set}", "mode.written.answer_column=ids"],
        ["mode.name=sft", "loss.divergence=jsd"],
        ["prefix.policy=adaptive", "prefix.recall.threshold=0.1", "mode.warmup_steps=5"],
    ],
)
def test_a_recipe_of_any_mode_has_a_pilot(given: list[str], tmp_path: Path) -> None:
    sort_chain.write_dataset(tmp_path / "set.jsonl", 3, 0)
    given = [word.format(set=tmp_path / "set.jsonl") for word in given]
    given += [f"data.path={tmp_path / 'set.jsonl'}", "eval.path="]
    made = pilot_of(load_recipe("quickstart", overrides=given), "quickstart", given, 3)
    validate(made)
    assert (made.train.steps, made.mode.name, made.prefix.min_length) == (3, "on_policy", 75)
    assert needs_rollouts(made) and not needs_written(made) and not made.prefix.recall.threshold


def test_a_pilot_has_the_overlays_settings_too(tmp_path: Path) -> None:
    overlay = tmp_path / "more.yaml"
    overlay.write_text("train: {seed: 7}")
    made = pilot_of(load_recipe("quickstart", str(overlay)), "quickstart", [], 3, str(overlay))
    assert (made.train.seed, made.train.steps) == (7, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--share", "1.5"], "--share 1.5 must lie between 0 and 1"),
        (["--policy", "adaptiv"], "adaptiv"),
        (["--step", "9"], "no full-length rollouts after step 9"),
        (["train.steps=3"], "train.steps=3: a run's settings stay"),
        (["--overlay", "more.yaml"], "more.yaml: a run's settings stay"),
        (["--pilot-steps", "0"], "--pilot-steps 0 must be at least 1"),
    ],
)
def test_bad_words_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run", True)
    assert main(["advise", str(run), *words]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
