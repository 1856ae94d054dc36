"""Transformer Engine's student on one GPU: as transformers, as the CPU, and FP8 as bf16."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_prefix.config import Fp8Config

pytestmark = pytest.mark.gpu
RECIPES = {
    "blockwise": Fp8Config("e4m3", "blockwise"),
    "tensorwise": Fp8Config("hybrid", "tensorwise"),
    "delayed": Fp8Config("hybrid", "delayed", first_last_layers_bf16=False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from tests.gpu.steps import write_models

    return write_models(tmp_path_factory.mktemp("models"))


def test_transformer_engine_is_what_runs(one_rank: torch.device) -> None:
    from megatron_prefix.mcore.model import uses_transformer_engine

    assert uses_transformer_engine(), "megatron-prefix doctor says how to install it"


def test_logits_equal_transformers_in_bf16(
    folders: tuple[Path, Path], one_rank: torch.device
) -> None:
    import transformers

    from tests.gpu.steps import VOCABULARY, prefix_logits, sampled

    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folders[0], dtype=torch.float32
    ).to(one_rank)
    got = prefix_logits(folders[0], sampled(), one_rank, "bf16", together=True)
    for rollout, logits in zip(sampled(), got, strict=True):
        ids = torch.tensor([(*rollout.prompt_ids, *rollout.prefix_ids)[:-1]], device=one_rank)
        with torch.no_grad():
            expected = reference(ids).logits[0, len(rollout.prompt_ids) - 1 :, :VOCABULARY].cpu()
        assert (logits - expected).norm() < 0.02 * expected.norm()


def test_packed_sequences_of_unlike_lengths_do_not_see_each_other(
    folders: tuple[Path, Path], one_rank: torch.device
) -> None:
    from tests.gpu.steps import prefix_logits, sampled

    together, apart = (
        prefix_logits(folders[0], sampled(), one_rank, "bf16", together=packed)
        for packed in (True, False)
    )
    assert len({len(each) for each in together}) > 5
    for one, other in zip(together, apart, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "grouped experts"])
def test_a_step_equals_the_cpus(
    experts: bool, folders: tuple[Path, Path], one_rank: torch.device, tmp_path: Path
) -> None:
    """The CPU's own layers in fp32 on the same weights, in a process that sees no GPU."""
    from tests.gpu.steps import Setting, cosine, one_step, write_experts

    if experts:
        folders = write_experts(tmp_path / "experts"), folders[1]
    result = tmp_path / "cpu.pt"
    command = [sys.executable, "-m", "tests.gpu.cpu_reference", *map(str, folders), str(result)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, got = torch.load(result), one_step(Setting(*folders), one_rank)
    assert got.loss == pytest.approx(expected["loss"], rel=0.01)
    assert cosine(got.gradient, expected["gradient"]) > 0.999


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_trunks_learn_as_bf16_does(
    recipe: str, folders: tuple[Path, Path], one_rank: torch.device
) -> None:
    from tests.gpu.steps import Setting, cosine, one_step

    plain = one_step(Setting(*folders), one_rank)
    quantised = one_step(Setting(*folders, fp8=RECIPES[recipe]), one_rank)
    assert quantised.loss == pytest.approx(plain.loss, rel=0.01)
    assert cosine(plain.gradient, quantised.gradient) > 0.99
    assert not torch.equal(plain.gradient, quantised.gradient)


@pytest.mark.parametrize("recipe", RECIPES)
def test_grouped_experts_in_fp8_learn_as_in_bf16(
    recipe: str, folders: tuple[Path, Path], one_rank: torch.device, tmp_path: Path
) -> None:
    from tests.gpu.steps import Setting, cosine, one_step, write_experts

    student = write_experts(tmp_path)
    plain = one_step(Setting(student, folders[1]), one_rank)
    quantised = one_step(Setting(student, folders[1], fp8=RECIPES[recipe]), one_rank)
    assert quantised.loss == pytest.approx(plain.loss, rel=0.02)
    assert cosine(plain.gradient, quantised.gradient) > 0.98
    assert not torch.equal(plain.gradient, quantised.gradient)


def test_delayed_scales_follow_the_amax_of_a_step(
    folders: tuple[Path, Path], one_rank: torch.device
) -> None:
    """They begin at 1, and a step's largest values move those of inputs and of weights."""
    from tests.gpu.steps import Setting, one_step

    moved = one_step(Setting(*folders, fp8=RECIPES["delayed"]), one_rank).scales
    assert len(moved) == 4 * 4  # linears of four layers
    for scales in moved:
        assert scales.isfinite().all() and (scales[:2] > 1).all()
    assert not one_step(Setting(*folders, fp8=RECIPES["tensorwise"]), one_rank).scales


@pytest.mark.parametrize("recipe", ["blockwise", "tensorwise"])
def test_student_and_teacher_each_take_their_own_recipe(
    recipe: str, folders: tuple[Path, Path], one_rank: torch.device
) -> None:
    from tests.gpu.steps import Setting, cosine, one_step

    plain = one_step(Setting(*folders), one_rank)
    other = {"blockwise": "tensorwise", "tensorwise": "blockwise"}[recipe]
    fp8 = {"fp8": RECIPES[recipe], "teacher_fp8": RECIPES[other]}
    both = one_step(Setting(*folders, **fp8), one_rank)
    assert both.loss == pytest.approx(plain.loss, rel=0.02)
    assert cosine(plain.gradient, both.gradient) > 0.98
