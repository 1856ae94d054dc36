"""What ``inspect_checkpoint.py`` says of Hugging Face folders; of Megatron's, see test_convert."""

import json
from pathlib import Path

import pytest

from tests.distributed.test_convert import edit, run_tool, tensors
from tests.tiny_models import write_tiny_qwen3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_qwen3(tmp_path / "model", vocab_size=265)


def test_a_hugging_face_folder_is_described(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_tool("inspect_checkpoint", model, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["family"] == "Qwen3ForCausalLM"
    assert found["parameters"] == sum(t.numel() for t in tensors(model).values())
    assert found["precision"] == {"F32": found["tensors"]}
    assert found["problems"] == []
    edit(model, lambda held: held.pop("model.norm.weight"))
    assert run_tool("inspect_checkpoint", model) == 1
    assert "model.norm.weight is missing" in capfd.readouterr().out


def test_a_quantisation_that_is_not_read_here_is_named_and_no_damage(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    edit(model, lambda held: held.pop("model.layers.0.mlp.up_proj.weight"))
    assert run_tool("inspect_checkpoint", model, "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["quantization"], found["supported"]) == ("awq", False)
    assert found["parameters"] == "unknown" and found["precision"] == {"F32": found["tensors"]}
    assert (
        run_tool("convert_hf_to_megatron", "--hf-model", model, "--output", tmp_path / "out") == 2
    )
    assert "quant_method='awq'" in capfd.readouterr().err
