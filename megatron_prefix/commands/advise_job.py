"""``megatron-prefix advise``: finds or makes a pilot, and shows what follows from it."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_prefix.advice.advise import POLICIES, SHARES, Advice, Costs, advise, block, overrides
from megatron_prefix.advice.pilot import Pilot, read_pilot
from megatron_prefix.config import Recipe, WrittenConfig
from megatron_prefix.exit_codes import DONE
from megatron_prefix.launcher import launch_local
from megatron_prefix.prefix import model_shape
from megatron_prefix.preflight import check_data_sets, check_machine
from megatron_prefix.recipe import (
    RECORD_NAME,
    NoRecipe,
    check_run_folder,
    load_recipe,
    load_record,
    write_own_data,
)
from megatron_prefix.report import picture
from megatron_prefix.run_files.jsonl import METRICS, number, read_records
from megatron_prefix.validate import validate
from megatron_prefix.validate.limits import check_choice

PICTURE = "advice"
# Full length, no student moved: what is left of the learning rate is under fp32's resolution.
_PILOT = (
    "optimizer.lr=1e-15", "optimizer.min_lr=0", "optimizer.lr_warmup_steps=0",
    "mode.name=on_policy", "mode.warmup_steps=0", "rollout.replay=",
    "prefix.policy=fixed", "prefix.cut_off.rule=none", "prefix.recall.threshold=0",
    "eval.path=", "log.probe_interval=0", "log.tensorboard=false", "checkpoint.export_hf=false",
)  # fmt: skip


_LENGTHS = (
    "Lengths: the advised one, the shortest that hold "
    f"{', '.join(f'{share:.0%}' for share in SHARES)} of the signal, and full length."
)


def run_advise(arguments: argparse.Namespace) -> int:
    """The exit code; ValueError for what cannot be, before anything is started."""
    if not 0 <= arguments.share < 1:
        raise ValueError(f"--share {arguments.share} must lie between 0 and 1, like 0.8")
    if arguments.pilot_steps < 1:
        raise ValueError(f"--pilot-steps {arguments.pilot_steps} must be at least 1, like 4")
    if arguments.policy:
        check_choice("--policy", arguments.policy, POLICIES)
    folder, recipe = Path(arguments.source), None
    if not (folder / RECORD_NAME).is_file():
        folder, recipe, code = _make_pilot(arguments)
        if code != DONE:
            return code
    elif arguments.overrides or arguments.overlay:
        words = " ".join([*arguments.overrides, *filter(None, [arguments.overlay])])
        raise ValueError(f"{words}: a run's settings stay; name a recipe")
    run = load_record(folder / RECORD_NAME)
    pilot = read_pilot(folder, run, arguments.step)
    costs = Costs(pilot, *(_shape(owner, run) for owner in ("student", "teacher")))
    wanted = recipe or run
    steps = wanted.train.steps
    advice = advise(pilot, costs, arguments.share, wanted.prefix, steps, arguments.policy)
    _show(advice, pilot, steps, Path(arguments.output or folder), arguments.json)
    return DONE


def _make_pilot(arguments: argparse.Namespace) -> tuple[Path, Recipe, int]:
    """Runs the recipe's pilot, or finds it done; its folder, the recipe itself, the exit code."""
    if arguments.step is not None:
        raise ValueError(f"--step {arguments.step}: a pilot has none; name the folder of a run")
    source, overlay = arguments.source, arguments.overlay
    try:
        recipe = load_recipe(source, overlay, arguments.overrides)
    except NoRecipe as error:
        raise ValueError(f"{source} is no run's folder (no {RECORD_NAME}), and {error}") from error
    write_own_data(source)
    pilot = pilot_of(recipe, source, arguments.overrides, arguments.pilot_steps, overlay)
    folder = Path(pilot.run.output_dir, pilot.run.name)
    check_run_folder(folder, pilot)
    check_machine(validate(pilot))
    check_data_sets(pilot)
    if len(list(read_records(folder / METRICS))) >= pilot.train.steps:
        return folder, recipe, DONE
    return folder, recipe, launch_local(pilot)


def pilot_of(
    recipe: Recipe, source: str, given: Sequence[str], steps: int, overlay: str = ""
) -> Recipe:
    """``recipe``, which ``source``, ``overlay`` and the ``given`` settings come to, as full-length
    rollouts that move nothing. Written answers are left out: a pilot of any mode samples its
    own."""
    words = [*given, *_PILOT, f"train.steps={steps}", f"run.name={recipe.run.name}-pilot"]
    pilot = load_recipe(source, overlay, [*words, f"prefix.min_length={recipe.prefix.max_length}"])
    return replace(pilot, mode=replace(pilot.mode, written=WrittenConfig()))


def _shape(owner: str, recipe: Recipe):  # type: ignore[no-untyped-def]
    path = Path(getattr(recipe, owner).hf_path, "config.json")
    if not path.is_file():
        raise ValueError(f"{owner}.hf_path: {path} is not there; FLOPs follow from it")
    return model_shape(json.loads(path.read_text(encoding="utf-8")))


def _show(advice: Advice, pilot: Pilot, steps: int, output: Path, as_json: bool) -> None:
    output.mkdir(parents=True, exist_ok=True)
    png = _picture(advice, pilot).save(output)
    if as_json:
        told = {"pilot": pilot.source, "rollouts": pilot.rollouts, "png": str(png)}
        told |= {"block": block(advice.prefix), "overrides": overrides(advice.prefix)}
        told["kl_mass"] = [number(v) for v in pilot.mass.sum(axis=0)]
        print(json.dumps(advice.record() | told, allow_nan=False))
        return
    console = Console()
    console.print(_table(advice, pilot))
    console.print(_LENGTHS, highlight=False)
    low, high = advice.spread
    if high > low:
        console.print(f"Single steps of the pilot ask for {low} to {high} tokens.")
    for warning in advice.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False, soft_wrap=True)
    times = "" if advice.seconds is None else f" and about {advice.seconds:.2f}x of its time"
    console.print(
        f"\n{advice.prefix.policy} over {steps} steps: {advice.flops:.2f}x of full length's FLOPs"
        f"{times}. For the recipe:\n",
        highlight=False,
    )
    console.print(block(advice.prefix), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nor: {' '.join(overrides(advice.prefix))}\npicture: {png}", soft_wrap=True)


def _table(advice: Advice, pilot: Pilot) -> Table:
    table = Table(title=f"{pilot.rollouts} rollouts, {pilot.source}")
    for name in ("prefix length", "signal held", "FLOPs", "time, estimated"):
        table.add_column(name, justify="right")
    for option in advice.options:
        table.add_row(
            f"advised {option.length}" if option.length == advice.length else str(option.length),
            f"{option.share:.1%}",
            f"{option.flops:.2f}x",
            "-" if option.seconds is None else f"{option.seconds:.2f}x",
            style="bold" if option.length == advice.length else "",
        )
    return table


def _picture(advice: Advice, pilot: Pilot) -> picture.Picture:
    """Signal by position, and what a prefix of each length holds beside what it costs."""

    def paint(figure) -> None:  # type: ignore[no-untyped-def]
        left, right = figure.subplots(1, 2)
        mass = pilot.mass.sum(axis=0)
        positions = range(1, len(mass) + 1)
        left.bar(positions, 100 * mass / mass.sum(), width=1.0, color=picture.RUN_COLOURS[0])
        line = {"color": picture.RUN_COLOURS[1], "lw": 1.6, "ls": "--"}
        left.axvline(advice.length + 0.5, label=f"advised: {advice.length} tokens", **line)
        left.set_xlabel("position in the rollout")
        left.set_ylabel("% of the KL of all tokens")
        left.set_title("Where the signal lies")
        picture.legend_beside_title(left)
        held = 100 * mass.cumsum() / mass.sum()
        right.plot([0, *positions], [0, *held], lw=2, label="signal held")
        for name, key, index in (("FLOPs", "flops", 1), ("time, estimated", "seconds", 2)):
            values = [getattr(option, key) for option in advice.options]
            if None not in values:
                style = picture.run_style(index)
                shown = [100 * value for value in values]
                right.plot([o.length for o in advice.options], shown, lw=1.6, label=name, **style)
        right.set_xlabel("prefix length, tokens")
        right.set_ylabel("% of full length's")
        right.set_title("What a prefix holds")
        picture.legend_beside_title(right)

    words = f"signal by position and the share that prefixes hold; {advice.length} tokens hold it"
    return picture.draw(PICTURE, paint, (11, 3.9), words=words, caption="")
