"""What runs on a GPU alone, as far as a CPU can run it: the cores of benchmarks and GPU tests."""

import dataclasses
import math
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import _step_at_width as step
from benchmarks import gpu_loss, gpu_step
from megatron_prefix.mcore.groups import initialize_megatron
from megatron_prefix.recipe import load_recipe
from megatron_prefix.student import _Accumulator
from megatron_prefix.tasks import sort_chain
from megatron_prefix.types import PrefixBatch, TopKTargets
from megatron_prefix.validate import validate
from tests.distributed.ranks import run_ranks
from tests.gpu import cpu_reference
from tests.gpu.jobs import sort_chain_overrides
from tests.gpu.losses import errors, run_once, top_k_loss
from tests.gpu.steps import Outcome, Setting, cosine, one_step, prefix_logits, sampled, write_models
from tests.unit.loss.reference import make_case

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = gpu_loss.Size(40, 128, 16, 24)
NARROW = step.Width(64, 128, 4, 2, 16, 200)


def test_gpu_loss_measures_one_rank() -> None:
    rows = gpu_loss.measure(TINY, CPU, 2, with_liger=False, dtype=torch.float32)
    assert [row.method for row in rows] == ["gemms", "ours", "ours", "ours"]
    assert all(row.ms > 0 and row.over_gemms > 0 for row in rows)
    gpu_loss.print_rows(rows, "tiny")


def _over_ranks() -> list[gpu_loss.Row]:
    return gpu_loss.measure_ranks(TINY, CPU, 2, dtype=torch.float32)


def test_gpu_loss_measures_several_ranks() -> None:
    for rows in run_ranks(2, _over_ranks):
        assert [row.divergence for row in rows] == list(gpu_loss.DIVERGENCES)
        assert all(row.ranks == 2 and row.hidden is not None for row in rows)


def test_the_floor_adds_to_main_grad_what_the_loss_adds() -> None:
    """With the logits' place taken for their gradient: the same GEMMs on other numbers."""
    inputs = gpu_loss.make_inputs(TINY, CPU, torch.float32)
    gpu_loss.gemms(inputs)
    first = inputs.weight.main_grad.clone()
    assert first.isfinite().all()
    gpu_loss.ours(inputs, "jsd")
    assert not torch.equal(inputs.weight.main_grad, first)


def _real_step(folder: Path) -> step.Row:
    initialize_megatron(1)
    load = step.Load(rollouts=4, microbatches=2, prompt=12, prefix=10)
    return step.measure("off", folder, NARROW, 2, load, 4, CPU, params_dtype="fp32")


def test_gpu_step_runs_a_training_step(tmp_path: Path) -> None:
    (row,) = run_ranks(1, _real_step, tmp_path)
    assert math.isfinite(row.first_loss) and row.last_loss < row.first_loss
    assert row.tokens % 128 == 0 and row.tokens_a_second > 0 and row.layers == 2
    gpu_step.print_row(row, "tiny")


def test_layers_that_fit() -> None:
    width = step.Width()
    assert step.layers_that_fit(1 << 30, width) == 1
    assert 8 < step.layers_that_fit(141 << 30, width) < 24
    assert step.layers_that_fit(1 << 50, width) == 36
    assert step.layers_that_fit(141 << 30, replace(width, hidden=2048)) == 36


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


def test_the_step_that_gpu_tests_compare(folders: tuple[Path, Path]) -> None:
    """The bounds that the GPU's bf16 is held to hold for the CPU's."""
    ((single, narrow),) = run_ranks(1, _steps, Setting(*folders, "fp32"))
    assert narrow.loss == pytest.approx(single.loss, rel=0.01)
    assert cosine(single.gradient, narrow.gradient) > 0.999


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
    seen = _Accumulator(9, torch.device("meta"))
    seen.add(batch, tensor(), tensor(5), tensor(5))
    seen.watch(tensor(5), TopKTargets(tensor(5, 2, dtype=torch.int64), tensor(5, 2)), {})
    assert seen.kl.shape == (9,) and seen.worst.shape == (2,)


@pytest.mark.parametrize(("fp8", "stages"), [("off", 1), ("tensorwise", 1), ("delayed", 2)])
def test_the_job_that_a_gpu_test_starts_is_valid(fp8: str, stages: int, tmp_path: Path) -> None:
    overrides = sort_chain_overrides(fp8, tmp_path, stages)
    files = sort_chain.prepare_data(tmp_path / "data")
    overrides += [f"data.path={files.train}", f"eval.path={files.held_out}"]
    run = validate(load_recipe(str(ROOT / "recipes" / "quickstart.py"), overrides=overrides))
    assert run.world_size == stages
    assert run.recipe.rollout.server_args == ("--mem-fraction-static", "0.2")
    assert (run.recipe.student.fp8.format != "off") == (fp8 != "off")


def test_no_world_is_left_behind() -> None:
    assert not dist.is_initialized()
