"""The parity check finds nothing where there is nothing, and the layer where there is something."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prefix.mcore import parity
from megatron_prefix.mcore.hf_map import read_hf_model
from tests.distributed.test_convert import check_refused, run_tool, to_hf, to_megatron
from tests.distributed.world import model_config
from tests.tiny_models import write_tiny_deepseek_v3, write_tiny_mixtral, write_tiny_qwen2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_qwen2(tmp_path / "model", vocab_size=61, tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("write", "arguments"),
    [
        (write_tiny_qwen2, ["--tp", 2, "--pp", 2]),
        (write_tiny_mixtral, ["--tp", 2, "--ep", 2]),
        (write_tiny_mixtral, ["--cp", 2, "--etp", 2, "--tp", 2]),
    ],
)
def test_the_tool_agrees_with_itself(
    write, arguments: list, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "model", vocab_size=61)
    assert run_tool("check_parity", "--hf-model", folder, *arguments) == 0
    assert "none" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tp", 0], "--tp 0 must be 1 or more"),
        (["--cp", -1], "--cp -1 must be 1 or more"),
        (["--etp", 0], "--etp 0 must be 1 or more"),
        (["--prompts", 0], "--prompts 0 must be 1 or more"),
        (["--prompt-tokens", 0], "--prompt-tokens 0 must be 1 or more"),
        (["--new-tokens", 0], "--new-tokens 0 must be 1 or more"),
        (["--tolerance", -1], "--tolerance -1.0 must be 0 or more"),
        (["--tolerance", "nan"], "--tolerance nan must be 0 or more"),
        (["--prompt-tokens", 500], "are 516 tokens, and max_position_embeddings is 512"),
        (["--server", "here"], "--server here is no URL"),
        (["--server", "http://127.0.0.1:9"], "--server http://127.0.0.1:9: "),
        (["--api-key-file", "nowhere"], "--api-key-file nowhere is no file"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_a_model_is_loaded(
    arguments: list,
    words: str,
    model: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parity, "reference_view", lambda *_: pytest.fail("a model was loaded"))
    code = run_tool("check_parity", "--hf-model", model, *arguments)
    check_refused(capfd, code, words)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.norm.weight", "logits"),
        ("lm_head.weight", "logits"),
        ("model.layers.1.mlp.up_proj.weight", "layer 1"),
    ],
)
def test_values_that_are_not_finite_do_not_agree(
    name: str, where: str, model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    held = load_file(model / "model.safetensors")
    held[name].view(-1)[3] = float("nan")
    save_file(held, model / "model.safetensors", metadata={"format": "pt"})
    assert run_tool("check_parity", "--hf-model", model, "--prompts", 2, "--new-tokens", 2) == 1
    said = " ".join(capfd.readouterr().out.split())
    assert f"values that are not finite (transformers: {where}, here: {where})" in said


def test_folders_in_fp8_are_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = {"vocab_size": 61, "hidden_size": 128, "moe_intermediate_size": 128}
    plain = write_tiny_deepseek_v3(tmp_path / "model", **sizes, intermediate_size=256)
    assert to_megatron(plain, tmp_path / "megatron") == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "fp8", "--dtype", "fp8") == 0
    assert run_tool("check_parity", "--hf-model", tmp_path / "fp8", "--ep", 2) == 0
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
