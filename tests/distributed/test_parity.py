"""The parity check finds nothing where there is nothing, and the layer where there is something."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prefix.mcore import parity
from megatron_prefix.mcore.hf_map import read_hf_model
from tests.distributed.test_convert import run_tool
from tests.distributed.world import model_config
from tests.tiny_models import write_tiny_mixtral, write_tiny_qwen2


@pytest.mark.parametrize(
    ("write", "arguments"),
    [
        (write_tiny_qwen2, ["--tp", 2, "--pp", 2]),
        (write_tiny_mixtral, ["--tp", 2, "--ep", 2]),
    ],
)
def test_the_tool_agrees_with_itself(
    write, arguments: list, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "model", vocab_size=61)
    assert run_tool("check_parity", "--hf-model", folder, *arguments) == 0
    assert "none" in capfd.readouterr().out


def test_a_layout_that_cannot_be_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_qwen2(tmp_path / "model")
    assert run_tool("check_parity", "--hf-model", folder, "--tp", 3) == 2
    assert "tensor_model_parallel_size=3 does not divide" in capfd.readouterr().err


def test_the_first_layer_that_differs_is_found(tmp_path: Path) -> None:
    sizes = {"vocab_size": 61, "num_hidden_layers": 3}
    folder = write_tiny_qwen2(tmp_path / "model", **sizes)
    other = write_tiny_qwen2(tmp_path / "other", **sizes)
    held = load_file(other / "model.safetensors")
    held["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(held, other / "model.safetensors", metadata={"format": "pt"})
    prompts = parity.random_prompts(read_hf_model(str(folder)), 3, 12, seed=0)
    reference, rollouts = parity.reference_view(folder, prompts, 8, "fp32")
    found = parity.compare(
        reference, parity.megatron_view(model_config(other, pp=3), 3, rollouts), 1e-4
    )
    assert found.first_layer_apart == 1
    assert found.tokens == 24
    assert found.largest_logprob > 1e-3
    assert not found.agrees(1e-4)


def test_what_follows_another_token_is_not_compared() -> None:
    def view(tokens: tuple[int, ...], logprobs: list[float]) -> parity.View:
        return parity.View((tokens,), (torch.tensor(logprobs),))

    reference = view((1, 2, 3, 4), [-0.1, -0.2, -0.3, -0.4])
    sampled = view((1, 2, 9, 9), [-0.1, -0.25, -5.0, -5.0])
    found = parity.compare(reference, sampled, 1e-4)
    assert (found.tokens, found.other_tokens) == (3, 1)
    assert found.largest_logprob == pytest.approx(0.05)
    ended = parity.compare(reference, view((1, 2), [-0.1, -0.2]), 1e-4)
    assert (ended.tokens, ended.other_tokens) == (2, 0)
