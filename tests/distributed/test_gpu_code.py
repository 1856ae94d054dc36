"""What runs on a GPU alone, as far as a CPU can run it: the cores of benchmarks and GPU tests."""

import dataclasses
import gc
import json
import math
import multiprocessing
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel

from benchmarks import _card, gpu_loss, gpu_step
from benchmarks import _step_at_width as step
from megatron_prefix.config import ModelConfig
from megatron_prefix.mcore.groups import initialize_megatron
from megatron_prefix.recipe import load_recipe
from megatron_prefix.tasks import sort_chain
from megatron_prefix.types import PrefixBatch, TopKTargets
from megatron_prefix.validate import validate
from megatron_prefix.weighing.prefix_sums import Tally
from tests.distributed.ranks import run_ranks
from tests.distributed.world import build
from tests.gpu import cpu_reference
from tests.gpu.jobs import sort_chain_overrides
from tests.gpu.learning import Lesson, learn, sample
from tests.gpu.losses import errors, run_once, top_k_loss
from tests.gpu.steps import (
    Outcome,
    Setting,
    cosine,
    one_step,
    prefix_logits,
    sampled,
    write_experts,
    write_models,
)
from tests.unit.loss.reference import make_case

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = gpu_loss.Size(40, 128, 16, 24)
NARROW = step.Width(64, 128, 4, 2, 16, 200)


def _bench(group: dist.ProcessGroup | None = None) -> gpu_loss.Bench:
    return gpu_loss.Bench(TINY, CPU, 2, torch.float32, group)


def test_gpu_loss_measures_one_rank() -> None:
    attempts = _card.Attempts()
    rows = gpu_loss.measure(_bench(), attempts)
    assert [row["method"] for row in rows] == ["gemms", "ours", "ours", "ours"]
    assert all(row["ms"] > 0 and row["over_gemms"] > 0 for row in rows)
    assert attempts.failed == 0 and _card.markdown(rows).count("\n") == 5


def _over_ranks() -> tuple[list[_card.Cells], int]:
    attempts = _card.Attempts()
    return gpu_loss.measure(_bench(dist.group.WORLD), attempts)[1:], attempts.failed


def test_gpu_loss_measures_several_ranks() -> None:
    for rows, failed in run_ranks(2, _over_ranks):
        assert [row["divergence"] for row in rows] == list(gpu_loss.DIVERGENCES)
        assert all(row["ranks"] == 2 and math.isfinite(row["hidden"]) for row in rows)
        assert failed == 0


def test_a_row_that_fails_says_why_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A teacher whose hidden states are of another width than its head: no GEMM takes them."""
    bench, attempts = _bench(), _card.Attempts()
    broken = replace(bench.inputs(), teacher_weight=torch.zeros(TINY.rows, 7))
    kept = weakref.ref(broken.teacher_weight)
    rows: list[_card.Cells] = [{"method": "broken", **_attempt(attempts, broken)}]
    del broken
    rows.append({"method": "ours", **attempts.measure(lambda: bench.row(_reverse, None))})
    assert kept() is None and attempts.failed == 1
    assert str(rows[0]["error"]).startswith("ValueError: ") and rows[1]["ms"] > 0
    _card.report("tiny", rows, tmp_path / "rows.json")
    printed = capsys.readouterr().out
    assert "| broken | ValueError: " in printed and f"torch {torch.__version__}" in printed
    told = json.loads((tmp_path / "rows.json").read_text())
    assert told["rows"][0] == rows[0]
    assert {"card", "driver", "cuda", "torch", *_card.PACKAGES} <= told["machine"].keys()


def _attempt(attempts: _card.Attempts, inputs: gpu_loss.Inputs) -> _card.Cells:
    def call() -> _card.Cells:
        gpu_loss.ours(inputs, "reverse_kl")
        return {}

    return attempts.measure(call)


def _reverse(inputs: gpu_loss.Inputs) -> None:
    gpu_loss.ours(inputs, "reverse_kl")


def test_memory_by_arithmetic() -> None:
    """The figures in the help, in MiB; a shard of eight stays under a GiB and a half."""
    by_size = {gpu_loss.SHARD: (1, 934), gpu_loss.WHOLE: (1, 3689)}
    for size, (in_flight, expected) in by_size.items():
        found = gpu_loss.expected_bytes(size, in_flight) / 2**20
        assert round(found) == expected and str(expected) in (gpu_loss.__doc__ or "")
    assert gpu_loss.expected_bytes(gpu_loss.SHARD, 2) < 1.5 * 2**30


def test_the_floor_adds_to_main_grad() -> None:
    inputs = gpu_loss.make_inputs(TINY, CPU, torch.float32)
    gradient = gpu_loss.gradient_of_logits(inputs)
    gpu_loss.gemms(inputs, gradient)
    torch.testing.assert_close(inputs.weight.main_grad, gradient.T @ inputs.hidden.detach())


def _real_step(folder: Path) -> step.Row:
    initialize_megatron(1)
    load = step.Load(rollouts=4, microbatches=2, prompt=12, prefix=10)
    row = step.measure("off", folder, NARROW, 2, load, 4, CPU, params_dtype="fp32")
    _card.free_memory()
    left = [each for each in gc.get_objects() if isinstance(each, GPTModel)]
    assert not left  # the next row needs the memory
    return row


def test_gpu_step_runs_a_training_step(tmp_path: Path) -> None:
    (row,) = run_ranks(1, _real_step, tmp_path)
    assert math.isfinite(row.first_loss) and row.last_loss < row.first_loss
    assert row.tokens % 128 == 0 and row.tokens_a_second > 0 and row.layers == 2
    assert "off" in _card.markdown([dataclasses.asdict(row)])


def test_layers_that_fit() -> None:
    width, load = step.Width(), step.Load()
    assert step.layers_that_fit(1 << 30, width, load) == 1
    assert step.layers_that_fit(139 << 30, width, load) == 20
    assert step.layers_that_fit(79 << 30, width, load) == 9
    assert step.layers_that_fit(1 << 50, width, load) == 36
    assert step.needed_bytes(20, width, load) == pytest.approx(132e9, rel=0.01)
    assert "20 layers of 139 GiB" in (gpu_step.__doc__ or "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
@pytest.mark.parametrize("script", ["gpu_loss", "gpu_step"])
def test_without_a_gpu_a_benchmark_says_so_in_one_line(script: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{script}", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{script}.py needs an NVIDIA GPU and this machine has none: nothing was measured\n"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


def _steps(setting: Setting) -> tuple[Outcome, Outcome]:
    initialize_megatron(1)
    return one_step(setting, CPU), one_step(replace(setting, params_dtype="bf16"), CPU)


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_the_step_that_gpu_tests_compare(
    experts: bool, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """The bounds that the GPU's bf16 is held to hold for the CPU's."""
    student = write_experts(tmp_path) if experts else folders[0]
    ((single, narrow),) = run_ranks(1, _steps, Setting(student, folders[1], "fp32"))
    assert narrow.loss == pytest.approx(single.loss, rel=0.01)
    assert cosine(single.gradient, narrow.gradient) > 0.999
    assert not single.scales


def _own_step(setting: Setting) -> Outcome:
    initialize_megatron(1)
    return one_step(setting, CPU)


def test_the_step_over_context_parallel_ranks_that_gpu_tests_compare(
    folders: tuple[Path, Path],
) -> None:
    (whole,) = run_ranks(1, _own_step, Setting(*folders, "fp32"))
    first, second = run_ranks(2, _own_step, Setting(*folders, "fp32", context_parallel_size=2))
    assert first.loss == second.loss == pytest.approx(whole.loss, rel=1e-5)
    assert torch.equal(first.gradient, second.gradient)
    torch.testing.assert_close(first.gradient, whole.gradient, rtol=1e-3, atol=1e-6)


def _lesson() -> tuple[list[str], list[float], list[float]]:
    """The teacher's greedy answers, the losses of steps on prefixes that the student samples, and
    of steps on the same ones again and again."""
    initialize_megatron(1)
    teacher = build(_sort_chain("teacher"), 1, owner="student")
    prompts = [problem.prompt for problem in _problems()]
    answers = sample(teacher, prompts, sort_chain.RESPONSE_LENGTH, CPU)
    assert all(answer.finish_reason == "stop" for answer in answers)
    lesson = Lesson.build(CPU, 40, "fp32")
    fresh = learn(lesson, 2, rollouts=8, every=2)
    same = sample(lesson.student.model, prompts, 9, CPU, torch.Generator().manual_seed(0))
    again = [lesson.step(same) for _ in range(25)]
    return [sort_chain.decode(answer.prefix_ids) for answer in answers], fresh, again


def _sort_chain(name: str) -> ModelConfig:
    return ModelConfig(str(sort_chain.model_folder(name)), params_dtype="fp32")


def _problems() -> list[sort_chain.Problem]:
    return sort_chain.make_problems(8, sort_chain.HELD_OUT_SEED)


def test_sort_chain_learnt_without_servers() -> None:
    ((answers, fresh, again),) = run_ranks(1, _lesson)
    right = [problem.response == text for problem, text in zip(_problems(), answers, strict=True)]
    assert sum(right) >= 7
    assert all(0 < loss < math.inf for loss in fresh)
    assert again[-1] < 0.7 * again[0]


def test_the_cpu_reference_runs_by_itself(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Forked, to pay for no imports again."""
    result = tmp_path / "cpu.pt"
    arguments = [*map(str, folders), str(result)]
    child = multiprocessing.get_context("fork").Process(
        target=cpu_reference.main, args=(arguments,)
    )
    child.start()
    child.join(120)
    assert child.exitcode == 0
    told = torch.load(result)
    assert told["loss"] > 0 and told["gradient"].isfinite().all()


def _logits(folder: Path) -> list[list[torch.Tensor]]:
    initialize_megatron(1)
    return [prefix_logits(folder, sampled(), CPU, "fp32", together=each) for each in (True, False)]


def test_packed_sequences_of_unlike_lengths(folders: tuple[Path, Path]) -> None:
    ((together, apart),) = run_ranks(1, _logits, folders[0])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd"])
def test_the_loss_that_gpu_tests_compare(divergence: str) -> None:
    case = make_case(n=150, rows=520)
    found = errors(case, divergence, 503, 1.7, CPU)
    assert found.kl < 1e-6 and found.hidden_gradient < 5e-6 and found.weight_gradient < 5e-6
    assert top_k_loss(case, divergence, 503, CPU).isfinite().all()
    run_once(case, divergence, 503, CPU)


def test_what_a_step_gathers_of_its_microbatches_is_not_read_back() -> None:
    """On tensors without memory any read raises."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device="meta")

    ids = tensor(5, dtype=torch.int64)
    fields = {field.name: ids for field in dataclasses.fields(PrefixBatch)}
    floats = {"token_weight": tensor(5), "rollout_logprobs": tensor(5)}
    batch = PrefixBatch(**{**fields, **floats, "max_seqlen": 5})
    seen = Tally(9, torch.device("meta"))
    seen.add(batch, tensor(), tensor(5), tensor(5))
    target = TopKTargets(tensor(5, 2, dtype=torch.int64), tensor(5, 2))
    seen.watch(tensor(5), tensor(5), target, {})
    assert seen.kl.shape == (9,) and seen.worst.shape == (2,)


@pytest.mark.parametrize(("fp8", "stages"), [("off", 1), ("tensorwise", 1), ("delayed", 2)])
def test_the_job_that_a_gpu_test_starts_is_valid(fp8: str, stages: int, tmp_path: Path) -> None:
    overrides = sort_chain_overrides(fp8, tmp_path, stages)
    files = sort_chain.prepare_data(tmp_path / "data")
    overrides += [f"data.path={files.train}", f"eval.path={files.held_out}"]
    run = validate(load_recipe(str(ROOT / "recipes" / "quickstart.py"), overrides=overrides))
    assert run.world_size == stages
    assert run.recipe.rollout.server_args == ("--mem-fraction-static", "0.2")
    precision = run.recipe.student.fp8
    assert (precision.format != "off") == (fp8 != "off")
    # Of two layers none is left between the first and the last.
    assert fp8 == "off" or not precision.first_last_layers_bf16


def test_no_world_is_left_behind() -> None:
    assert not dist.is_initialized()
