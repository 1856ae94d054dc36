"""GPT-OSS as it is published, its experts in MXFP4: read, refused, written in bf16."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_prefix.mcore.mxfp4 import dequantize_mxfp4
from megatron_prefix.mcore.tensor_files import HfReader
from megatron_prefix.validate import read_model
from tests.distributed.test_convert import (
    check_equal,
    check_refused,
    run_tool,
    tensors,
    to_hf,
    to_megatron,
)
from tests.tiny_models import write_tiny_gpt_oss

EXPERTS = ("gate_up_proj", "down_proj")


def in_mxfp4(shape: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random blocks and scales of a weight [experts, rows in, columns out]."""
    experts, rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    grid = (experts, columns, rows // 32)
    blocks = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(118, 126, grid, dtype=torch.uint8, generator=generator)
    return blocks, scales


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder, and what transformers makes of its tensors in bf16."""
    folder = write_tiny_gpt_oss(tmp_path / "model", dtype="bfloat16")
    plain = {name: tensor.bfloat16() for name, tensor in tensors(folder).items()}
    stored = dict(plain)
    for seed, name in enumerate(sorted(plain)):
        if name.endswith(EXPERTS):
            blocks, scales = in_mxfp4(tuple(plain[name].shape), seed)
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, plain


def test_every_code_is_what_the_format_says() -> None:
    """The lower half of a byte first; sign, two bits of exponent, one of mantissa."""
    byte = torch.tensor([[[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]]]).byte()
    positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    expected = torch.cat([positive, -positive]).repeat(2)
    for scale, factor in ((127, 1.0), (130, 8.0), (120, 2.0**-7)):
        got = dequantize_mxfp4(byte, torch.tensor([[[scale]]]).byte())
        assert torch.equal(got, factor * expected.view(1, 32, 1))


def test_it_is_dequantised_when_it_is_read(
    published: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, plain = published
    hf = read_model(str(folder), "teacher")
    reader = HfReader(folder)
    for unit in hf.units:
        if unit.stacked and unit.layer == 1:
            (got,) = reader.of_unit(unit)
            assert torch.equal(got.bfloat16(), plain[unit.hf_names[0]][unit.expert])
    assert to_megatron(folder, tmp_path / "megatron") == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "back") == 0
    check_equal(plain, tensors(tmp_path / "back"))
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    read_model(str(tmp_path / "back"), "student")


def test_transformers_is_compared_on_the_same_weights(
    published: tuple[Path, dict[str, torch.Tensor]], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_tool("check_parity", "--hf-model", published[0]) == 0
    assert "none" in capfd.readouterr().out


def test_what_cannot_be_is_refused(
    published: tuple[Path, dict[str, torch.Tensor]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder, _ = published
    with pytest.raises(ValueError, match="is in MXFP4, and a student trains in bf16 or fp32"):
        read_model(str(folder), "student")
    assert to_megatron(folder, tmp_path / "megatron") == 0
    code = to_hf(tmp_path / "megatron", tmp_path / "fp8", "--dtype", "fp8")
    check_refused(capfd, code, "--dtype fp8", "GptOssForCausalLM has its experts stacked")
    held = tensors(folder)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    held[name] = held[name][:, :, :1].contiguous()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    words = (name, "is U8 [4, 64, 1], not U8 [4, 64, 3]")
    check_refused(capfd, to_megatron(folder, tmp_path / "out"), *words)
