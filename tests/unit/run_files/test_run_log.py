"""RunLog: what lands in the run folder, on the console and in TensorBoard."""

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_prefix.config import LogConfig
from megatron_prefix.run_files import jsonl
from megatron_prefix.run_files.kl_grid import mean_kl
from megatron_prefix.run_files.log import PACKAGE, RunLog, setup_logging
from megatron_prefix.run_files.progress import Pace, describe, duration
from megatron_prefix.run_files.tb_writer import flops_ratio, kl_heat_map
from megatron_prefix.types import Flops, StepMetrics

QUIET = LogConfig(tensorboard=False)


@dataclass(frozen=True)
class Answers:
    accuracy: float
    n: int = 50
    truncated: int = 2
    unparsable: int = 3
    tokens: int = 400
    seconds: float = 1.5


def metrics(step: int, length: int = 4) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=1.0 / step,
        kl_by_position=np.linspace(0.5, 0.1, length),
        tokens_by_position=np.arange(length, 0, -1),
        grad_norm=0.25,
        lr=1e-3,
        skipped=False,
        prefix_length=length,
        prefix_tokens=length * (length + 1) // 2,
        prompt_tokens=56,
        cut_fraction=0.75,
        policy_version=step,
        policy_lag=0.0,
        logprob_diff_max=1e-5,
        logprob_diff_mean=1e-6,
        flops=Flops(1e6, 2e6, 3e6),
        flops_full=Flops(4e6, 8e6, 12e6),
        seconds={"rollout": 0.3, "student": 0.1},
    )


def plain_console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=False, width=80), text


def open_log(folder: Path, log: LogConfig = QUIET, resume_step: int = 0) -> RunLog:
    return RunLog(folder, log, 10, console=plain_console()[0], resume_step=resume_step)


def steps_in(path: Path) -> list[int]:
    return [record["step"] for record in jsonl.read_records(path)]


def first_in(path: Path) -> dict[str, Any]:
    return next(jsonl.read_records(path))


def test_a_line_holds_every_field_of_the_metrics(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log:
        run_log.step(metrics(1))
        line = (tmp_path / "metrics.jsonl").read_text()  # flushed before close
    record = json.loads(line)
    assert set(record) == {field.name for field in fields(StepMetrics)}
    assert record["flops"] == {"rollout": 1e6, "teacher": 2e6, "student": 3e6}
    assert record["seconds"] == {"rollout": 0.3, "student": 0.1}
    assert record["tokens_by_position"] == [4, 3, 2, 1]
    np.testing.assert_allclose(record["kl_by_position"], metrics(1).kl_by_position, rtol=1e-5)


def test_the_loss_survives_the_file_to_the_last_bit(tmp_path: Path) -> None:
    loss = float(np.float32(1 / 3))
    with open_log(tmp_path) as run_log:
        run_log.step(replace(metrics(1), loss=loss))
    assert first_in(tmp_path / "metrics.jsonl")["loss"] == loss


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    broken = replace(
        metrics(1),
        loss=float("nan"),
        grad_norm=float("inf"),
        skipped=True,
        kl_by_position=np.array([0.5, np.nan, np.inf, 0.0]),
    )
    with open_log(tmp_path) as run_log:
        run_log.step(broken)
    record = first_in(tmp_path / "metrics.jsonl")
    assert (record["loss"], record["grad_norm"], record["skipped"]) == (None, None, True)
    assert record["kl_by_position"] == [0.5, None, None, 0.0]


def test_significant_digits_hold_over_all_magnitudes() -> None:
    values = np.array([0.0, -1.23456789e-300, 1.23456789e-12, 3.0, -9.87654321e200, 5e-324])
    np.testing.assert_allclose(np.array(jsonl.significant(values)), values, rtol=1e-5)
    assert jsonl.significant(np.array([0.123456789])) == [0.123457]
    assert jsonl.significant(np.zeros(0)) == []


def test_a_resume_counts_no_step_twice(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log:
        run_log.evaluation(0, Answers(0.1), Flops(rollout=7e6))
        for step in range(1, 6):
            run_log.step(metrics(step))
            run_log.rollouts(step, ["p"], ["x"], [{"finish": "stop"}])
        run_log.evaluation(5, Answers(0.2), Flops(rollout=7e6))
    with open_log(tmp_path, resume_step=3) as run_log:
        assert run_log.account.prefix_tokens == 30
        run_log.step(metrics(4))
        assert run_log.account.flops.total == pytest.approx(4 * 6e6)
        assert run_log.account.seconds == pytest.approx(4 * 0.4)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]
    assert steps_in(tmp_path / "metrics.discarded.jsonl") == [4, 5]
    assert steps_in(tmp_path / "samples.jsonl") == [1, 2, 3]
    assert steps_in(tmp_path / "evaluations.jsonl") == [0]
    assert steps_in(tmp_path / "evaluations.discarded.jsonl") == [5]


def test_the_half_line_of_a_killed_run_is_moved_away(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log:
        run_log.step(metrics(1))
        run_log.step(metrics(2))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-40])
    assert steps_in(path) == [1]
    with open_log(tmp_path, resume_step=2) as run_log:
        run_log.step(metrics(3))
    assert steps_in(path) == [1, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1}\n[]\n{"step":3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is no JSON object"):
        list(jsonl.read_records(path))


def test_evaluations_and_events(tmp_path: Path) -> None:
    with open_log(tmp_path) as run_log:
        run_log.step(metrics(1))
        run_log.evaluation(1, Answers(0.25), Flops(rollout=7e6))
        run_log.event("save", "checkpoint of step 1", seconds=float("nan"), bytes=12)
    evaluation = first_in(tmp_path / "evaluations.jsonl")
    expected = {"step": 1, "accuracy": 0.25, "n": 50, "truncated": 2, "unparsable": 3}
    expected["flops"] = 7e6
    expected |= {"tokens": 400, "seconds": 1.5}
    assert evaluation == expected
    event = first_in(tmp_path / "events.jsonl")
    assert (event["step"], event["kind"], event["bytes"]) == (1, "save", 12)
    assert event["seconds"] is None


def test_rollouts_are_limited_and_due_at_their_interval(tmp_path: Path) -> None:
    log = LogConfig(tensorboard=False, sample_rollouts=2, sample_rollouts_interval=5)
    with open_log(tmp_path, log) as run_log:
        assert [step for step in range(1, 11) if run_log.wants_rollouts(step)] == [5, 10]
        run_log.rollouts(5, ["a", "b", "c"], ["x", "y", "z"], [{"n": 1}, {"n": 2}, {"n": 3}])
        with pytest.raises(ValueError, match="zip"):
            run_log.rollouts(10, ["a"], [], [])
    samples = jsonl.read_records(tmp_path / "samples.jsonl")
    assert [(sample["prompt"], sample["details"]) for sample in samples] == [
        ("a", {"n": 1}),
        ("b", {"n": 2}),
    ]
    off = LogConfig(tensorboard=False, sample_rollouts_interval=0)
    with open_log(tmp_path, off) as run_log:
        assert not run_log.wants_rollouts(10)


def test_plain_lines_at_the_log_interval_and_at_the_end(tmp_path: Path) -> None:
    console, text = plain_console()
    log = LogConfig(tensorboard=False, log_interval=4)
    with RunLog(tmp_path, log, 10, console=console) as run_log:
        for step in range(1, 11):
            run_log.step(replace(metrics(step), skipped=step == 3))
    lines = text.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["3/10", "4/10", "8/10", "10/10"]
    assert lines[0].endswith("SKIPPED: not finite")
    assert lines[1].startswith(
        "step 4/10 loss 0.2500 kl 0.3667 L 4 24 MFLOP 0.25x tok/s 25 eta 0:02"
    )


def test_a_kl_that_reads_as_the_loss_does_is_not_said_twice() -> None:
    def said(loss: float) -> str:
        return describe(replace(metrics(4), loss=loss), Pace(10))

    assert said(0.36666).startswith("loss 0.3667 L 4 ")
    assert said(0.3668).startswith("loss 0.3668 kl 0.3667 L 4 ")


def test_a_terminal_gets_a_bar_from_the_resumed_step_on(tmp_path: Path) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=120)
    with RunLog(tmp_path, QUIET, 10, console=console, resume_step=6) as run_log:
        run_log.step(metrics(7))
    shown = text.getvalue()
    assert "6/10" in shown and "7/10" in shown
    assert "L 4" in shown and "eta" in shown


def test_mean_kl_weighs_by_tokens_and_is_nan_without_any() -> None:
    kl = np.array([1.0, 4.0, np.nan])
    assert mean_kl(kl, np.array([2, 1, 0])) == pytest.approx(2.0)
    assert np.isnan(mean_kl(kl, np.zeros(3, dtype=np.int64)))


def test_pace_and_durations() -> None:
    pace = Pace(total_steps=10)
    assert pace.tokens_per_second == 0.0
    pace.add(metrics(1))
    assert pace.tokens_per_second == pytest.approx(10 / 0.4)
    assert pace.seconds_left == pytest.approx(9 * 0.4)
    assert [duration(s) for s in (0, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]


def read_tensorboard(folder: Path):  # noqa: ANN201  (tensorboard ships no types)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_holds_scalars_image_and_text(tmp_path: Path) -> None:
    log = LogConfig(kl_by_position_interval=2)
    with open_log(tmp_path, log) as run_log:
        for step in (1, 2):
            run_log.step(metrics(step))
        run_log.rollouts(2, ["prompt"], ["prefix"], [{"finish": "cut"}])
        run_log.evaluation(2, Answers(0.5), Flops(rollout=7e6))
    events = read_tensorboard(tmp_path / "tensorboard")
    tags = events.Tags()
    wanted = {"loss/loss", "loss/kl", "optimizer/grad_norm", "optimizer/lr", "prefix/length",
              "prefix/cut_fraction", "rollout/policy_lag", "total/prefix_tokens", "flops/rollout",
              "flops/teacher", "flops/student", "total/flops_of_full_length", "seconds/rollout",
              "total/flops_probes",
              "evaluation/accuracy"}  # fmt: skip
    assert wanted <= set(tags["scalars"])
    ratios = [event.value for event in events.Scalars("total/flops_of_full_length")]
    assert ratios == pytest.approx([0.25, 0.25])
    assert [event.step for event in events.Images(tags["images"][0])] == [2]
    assert "rollouts/text_summary" in tags["tensors"]


def test_tensorboard_forgets_the_steps_a_resume_takes_again(tmp_path: Path) -> None:
    with open_log(tmp_path, LogConfig()) as run_log:
        for step in range(1, 6):
            run_log.step(metrics(step))
    with open_log(tmp_path, LogConfig(), resume_step=3) as run_log:
        run_log.step(metrics(4))
    events = read_tensorboard(tmp_path / "tensorboard").Scalars("loss/loss")
    assert [event.step for event in events] == [1, 2, 3, 4]


def test_the_heat_map_is_ragged_grey_past_the_end_and_brighter_with_the_kl() -> None:
    rows = (np.array([1e-4]), np.array([1e-2, 10.0, np.nan]))
    image = kl_heat_map(rows)
    assert image.dtype == np.uint8 and image.shape == (256, 255, 3)
    corner = {name: image[y, x].tolist() for name, y, x in
              (("low", 0, 0), ("past", 0, 250), ("high", 255, 100), ("nan", 255, 250))}  # fmt: skip
    assert corner["past"] == corner["nan"] == [128, 128, 128]
    assert sum(corner["high"]) > sum(corner["low"])


def test_a_long_prefix_is_averaged_down_without_its_nans() -> None:
    row = np.full(3000, 1.0)
    row[1::3] = np.nan
    image = kl_heat_map((row,))
    assert image.shape[1] == 1000
    assert len(np.unique(image.reshape(-1, 3), axis=0)) == 1
    assert kl_heat_map((np.zeros(0),)).shape == (256, 256, 3)  # a step without a position


def test_flops_ratio_without_a_counterfactual_is_nan() -> None:
    assert flops_ratio(Flops(1, 1, 1), Flops(2, 2, 2)) == 0.5
    assert np.isnan(flops_ratio(Flops(1, 1, 1), Flops()))


@pytest.fixture
def root_handlers() -> Iterator[None]:
    package = logging.getLogger(PACKAGE)
    level = package.level
    yield
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.name == PACKAGE]:
        root.removeHandler(handler)
        handler.close()
    package.setLevel(level)
    logging.captureWarnings(False)


@pytest.mark.usefixtures("root_handlers")
def test_every_record_names_its_rank_and_only_rank_0_speaks(tmp_path: Path) -> None:
    log = logging.getLogger(f"{PACKAGE}.part")
    console, text = plain_console()
    setup_logging(tmp_path, 3, console)
    log.info("from three")
    assert text.getvalue() == ""
    assert "rank 3 INFO megatron_prefix.part: from three" in log_of(tmp_path, 3)
    setup_logging(tmp_path, 0, console)
    log.info("from %s", "zero")
    log.debug("where it was")
    assert "rank 0 INFO megatron_prefix.part: from zero" in text.getvalue()
    assert "where it was" not in text.getvalue() and "where it was" in log_of(tmp_path, 0)
    assert "from zero" in log_of(tmp_path, 0) and "from zero" not in log_of(tmp_path, 3)


@pytest.mark.usefixtures("root_handlers")
def test_other_packages_are_heard_from_warnings_on(tmp_path: Path) -> None:
    setup_logging(tmp_path, 1)
    logging.getLogger("elsewhere").info("chatter")
    logging.getLogger("elsewhere").warning("trouble")
    assert "chatter" not in log_of(tmp_path, 1)
    assert "rank 1 WARNING elsewhere: trouble" in log_of(tmp_path, 1)


@pytest.mark.usefixtures("root_handlers")
def test_other_packages_warnings_are_for_the_file_and_their_errors_for_all(tmp_path: Path) -> None:
    console, text = plain_console()
    setup_logging(tmp_path, 0, console)
    logging.getLogger("py.warnings").warning("no Apex here")
    logging.getLogger("elsewhere").warning("GPTModel is deprecated")
    logging.getLogger("elsewhere").error("no memory left")
    written = log_of(tmp_path, 0)
    for message in ("no Apex here", "GPTModel is deprecated"):
        assert message in written and message not in text.getvalue()
    assert "rank 0 ERROR elsewhere: no memory left" in text.getvalue()


def log_of(folder: Path, rank: int) -> str:
    return (folder / "logs" / f"rank_{rank}.log").read_text()
