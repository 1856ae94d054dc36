"""Every implementation of the elementwise passes against fp64, on two shards and on one."""

import subprocess
import sys

import pytest
import torch
import triton
from torch import Tensor

from megatron_prefix.loss import native_kernels, prefix_divergence
from megatron_prefix.loss.divergence import (
    Divergence,
    gradient_factors,
    merge_statistics,
    token_values,
)
from megatron_prefix.loss.kernels import Kernels, Logits
from megatron_prefix.loss.torch_kernels import TorchKernels
from megatron_prefix.loss.triton_kernels import TritonKernels
from tests.unit.loss.reference import dense, dense_divergence, make_case, relative_error

TOKENS = 5


# Triton's own library is bound to its interpreter when triton is first imported, so these run in
# a process of their own, which test_triton_interpreter.py starts.
NAMES = ["triton"] if triton.knobs.runtime.interpret else ["torch", "native"]


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "torch":
        return TorchKernels()
    if request.param == "triton":
        return TritonKernels()
    if native_kernels.library() is None:
        pytest.skip("no C++ compiler")
    return native_kernels.NativeKernels()


def logits(columns: int, spread: float, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, columns, generator=draw) * spread


def weights() -> Tensor:
    return torch.rand(TOKENS, generator=torch.Generator().manual_seed(0))


def expected(
    student: Tensor, teacher: Tensor, weight: Tensor, divergence: Divergence
) -> tuple[Tensor, Tensor]:
    """Values [C] and the gradient to the raw student logits [C, V], by autograd in fp64."""
    raw = student.double().requires_grad_()
    log_s = (raw / divergence.temperature).log_softmax(-1)
    log_t = (teacher.double() / divergence.temperature).log_softmax(-1)
    values = dense_divergence(log_s, log_t, divergence.name, divergence.beta)
    (values * weight).sum().backward()
    assert raw.grad is not None
    return values.detach(), raw.grad


def run_shards(
    kernels: Kernels,
    shards: list[tuple[Tensor, Tensor]],
    weight: Tensor,
    divergence: Divergence,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The passes as ranks would do them, the gathers in between done by hand."""
    chunks = [Logits(x, y, divergence, dtype) for x, y in shards]
    gathered = torch.stack([kernels.statistics(each) for each in chunks])
    merged = [merge_statistics(gathered, rank, divergence) for rank in range(len(shards))]
    sums = None
    if divergence.name == "jsd":
        parts = [kernels.mixture(*pair) for pair in zip(chunks, merged, strict=True)]
        sums = torch.stack(parts).sum(0)
    gradients = [
        kernels.logit_gradient(chunk, gradient_factors(each, sums, weight, divergence))
        for chunk, each in zip(chunks, merged, strict=True)
    ]
    return token_values(merged[0], sums, divergence), torch.cat(gradients, 1)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
@pytest.mark.parametrize("cut", [0, 1, 16, 700, 4999, 5000])
def test_two_shards(kernels: Kernels, name: str, temperature: float, cut: int) -> None:
    """Rows longer than a Triton block, vectors that do not fill up, and a shard with no row."""
    divergence = Divergence(name, 0.3, temperature)
    student, teacher, weight = logits(5000, 3.0, 0), logits(5000, 3.0, 1), weights()
    values, gradient = expected(student, teacher, weight, divergence)
    shards = [
        (student[:, part].contiguous(), teacher[:, part].contiguous())
        for part in (slice(0, cut), slice(cut, 5000))
    ]
    got_values, got_gradient = run_shards(kernels, shards, weight, divergence, torch.float32)
    assert relative_error(got_values, values) < 1e-6
    assert relative_error(got_gradient, gradient) < 1e-6


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("columns", [1, 15, 33, 2048, 4109])
def test_one_rank(kernels: Kernels, name: str, columns: int) -> None:
    divergence = Divergence(name, 0.7, 0.8)
    student, teacher = logits(columns, 2.0, 2), logits(columns, 2.0, 3)
    weight = weights()
    values, gradient = expected(student, teacher, weight, divergence)
    rows = kernels.one_rank(Logits(student, teacher, divergence, torch.float32), weight)
    assert (rows.values - values).norm() <= 2e-6 * values.norm() + 1e-7
    assert (rows.gradient - gradient).norm() <= 2e-6 * gradient.norm() + 1e-7


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_a_chunk_may_stop_at_the_values(kernels: Kernels, name: str) -> None:
    divergence = Divergence(name, 0.5, 1.0)
    student, teacher = logits(300, 2.0, 4), logits(300, 2.0, 5)
    values, _ = expected(student, teacher, torch.ones(TOKENS), divergence)
    rows = kernels.one_rank(Logits(student, teacher, divergence, torch.float32), None)
    assert relative_error(rows.values, values) < 1e-6
    assert rows.statistics.shape == (TOKENS, 5)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_the_largest_logits_come_last(kernels: Kernels, name: str) -> None:
    """What Triton's running maximum has to mend: all sums so far belong to a lower one."""
    divergence = Divergence(name, 0.5, 1.0)
    ramp = torch.linspace(-200, 0, 9000).expand(TOKENS, -1)
    student, teacher = ramp + logits(9000, 1.0, 6), ramp * 0.9 + logits(9000, 1.0, 7)
    weight = weights()
    values, gradient = expected(student, teacher, weight, divergence)
    rows = kernels.one_rank(Logits(student, teacher, divergence, torch.float32), weight)
    assert relative_error(rows.values, values) < 1e-6
    assert relative_error(rows.gradient, gradient) < 2e-6


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(kernels: Kernels, name: str, poison: float) -> None:
    student, teacher = logits(300, 2.0, 8), logits(300, 2.0, 9)
    student[1, 17] = teacher[3, 299] = poison
    divergence = Divergence(name, 0.5, 1.0)
    rows = kernels.one_rank(Logits(student, teacher, divergence, torch.float32), torch.ones(TOKENS))
    assert rows.values.isfinite().tolist() == [True, False, True, False, True]


def test_several_threads_share_the_rows(kernels: Kernels) -> None:
    divergence, weight = Divergence("reverse_kl", 0.5, 1.0), weights()
    student, teacher = logits(300, 2.0, 10), logits(300, 2.0, 11)
    values, gradient = expected(student, teacher, weight, divergence)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        rows = kernels.one_rank(Logits(student, teacher, divergence, torch.float32), weight)
    finally:
        torch.set_num_threads(threads)
    assert relative_error(rows.values, values) < 1e-6
    assert relative_error(rows.gradient, gradient) < 1e-6


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_whole_loss(
    kernels: Kernels, divergence: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_prefix.loss.task.kernels_for", lambda device: kernels)
    case = make_case()
    settings = divergence, 0.3, temperature
    expected = dense(case, divergence, 199, 0.3, temperature)
    hidden, weight = case.student_hidden.requires_grad_(), case.student_weight.requires_grad_()
    result = prefix_divergence(*case.inputs, *settings, vocab_size=199, chunk_size=10)
    result.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert relative_error(result.kl, expected.kl) < 1e-6
    assert relative_error(hidden.grad, expected.hidden_gradient) < 5e-6
    assert relative_error(weight.grad, expected.weight_gradient) < 5e-6


def test_without_a_compiler_torch_does_the_work() -> None:
    """In a process of its own: the library is loaded once a process."""
    program = (
        "import shutil, torch\n"
        "shutil.which = lambda name: None\n"
        "from megatron_prefix.loss.backends import kernels_for\n"
        "print(type(kernels_for(torch.device('cpu'))).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "TorchKernels", done.stderr
    assert "install g++" in done.stderr


if "triton" in NAMES:  # in the process that runs Triton's interpreter

    def test_triton_writes_the_gradient_in_the_dtype_of_the_gemms() -> None:
        student, teacher = logits(300, 2.0, 12), logits(300, 2.0, 13)
        divergence, weight = Divergence("jsd", 0.5, 1.0), weights()
        _, gradient = expected(student, teacher, weight, divergence)
        rows = TritonKernels().one_rank(
            Logits(student, teacher, divergence, torch.bfloat16), weight
        )
        assert rows.gradient.dtype == torch.bfloat16
        # Half a unit in the last place would be 0.002, but the interpreter truncates.
        assert relative_error(rows.gradient, gradient) < 6e-3
