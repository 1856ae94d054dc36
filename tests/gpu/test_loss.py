"""The Triton loss on a GPU against dense fp64, and that it never waits for the device."""

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.losses import Errors, errors, run_once, top_k_loss
from tests.unit.loss.reference import make_case

pytestmark = pytest.mark.gpu
DIVERGENCES = ["reverse_kl", "forward_kl", "jsd"]
SIZES = {"n": 300, "rows": 5040, "d_s": 128, "d_t": 192}
VOCABULARY = 5003


@pytest.fixture
def fp32_gemms() -> Iterator[None]:
    """Not TF32, whose ten bits would be all that a comparison shows."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_fp32_against_fp64(divergence: str, temperature: float, fp32_gemms: None) -> None:
    found = errors(make_case(**SIZES), divergence, VOCABULARY, temperature, torch.device("cuda"))
    assert found.kl < 1e-6 and found.hidden_gradient < 5e-6 and found.weight_gradient < 5e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_against_fp64(divergence: str) -> None:
    """bf16 is only the inputs' and the logit gradient's: 0.2% where bf16 logits would cost 4%."""
    case = make_case(**SIZES, dtype=torch.bfloat16)
    found: Errors = errors(case, divergence, VOCABULARY, 1.0, torch.device("cuda"))
    assert found.kl < 2e-6 and found.hidden_gradient < 5e-3 and found.weight_gradient < 5e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_equals_the_cpus(divergence: str, fp32_gemms: None) -> None:
    case = make_case(**SIZES)
    gpu, cpu = (
        top_k_loss(case, divergence, VOCABULARY, torch.device(name)) for name in ("cuda", "cpu")
    )
    torch.testing.assert_close(gpu, cpu, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nothing_waits_for_the_device(divergence: str) -> None:
    case, device = make_case(**SIZES, dtype=torch.bfloat16), torch.device("cuda")
    run_once(case, divergence, VOCABULARY, device)  # compiles
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    there = [tensor.to(device) for tensor in case.inputs]
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_once(type(case)(*there), divergence, VOCABULARY, device)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.cuda.memory_allocated() > 0
