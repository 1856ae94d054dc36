"""FP8 weights with a scale a block: read, written, refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_prefix.mcore.fp8_blocks import dequantize_blocks, quantize_blocks
from megatron_prefix.validate import read_model
from tests.distributed.ranks import run_ranks
from tests.distributed.test_convert import check_refused, tensors, to_hf, to_megatron
from tests.distributed.test_hf_parity import prefix_logits, transformers_logits
from tests.distributed.world import model_config
from tests.tiny_models import write_tiny_deepseek_v3, write_tiny_llama

SCALE = "_scale_inv"


def reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block by block, in a loop."""
    rows, columns = weight.shape
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scale = float(weight[where].abs().max()) / 448 or 1.0
            scales[i, j] = scale
            quantized[where] = (weight[where] / scales[i, j]).to(torch.float8_e4m3fn)
    return quantized, scales


@pytest.mark.parametrize("shape", [(128, 256), (130, 300), (5, 7), (1, 129)])
def test_blocks_are_scaled_by_their_largest_value(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[:, 0] *= 50.0
    quantized, scales = quantize_blocks(weight)
    expected, expected_scales = reference(weight)
    assert torch.equal(quantized.view(torch.uint8), expected.view(torch.uint8))
    torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0)
    back = dequantize_blocks(quantized, scales)
    grid = scales.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]
    # e4m3 keeps three bits behind the leading one; below 2^-6 of the scale its steps are 2^-9.
    assert ((back - weight).abs() <= torch.maximum(weight.abs() * 2**-4, grid * 2**-10)).all()


def test_a_block_of_zeros_stays_one() -> None:
    quantized, scales = quantize_blocks(torch.zeros(130, 3))
    assert torch.equal(scales, torch.ones(2, 1))
    assert torch.equal(dequantize_blocks(quantized, scales), torch.zeros(130, 3))


@pytest.fixture(scope="module")
def in_fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and its FP8 export."""
    root = tmp_path_factory.mktemp("fp8")
    folder = write_tiny_deepseek_v3(root / "model", vocab_size=61, hidden_size=192)
    assert to_megatron(folder, root / "megatron") == 0
    assert to_hf(root / "megatron", root / "fp8", "--dtype", "fp8") == 0
    return folder, root / "fp8"


def test_the_export_is_laid_out_as_deepseeks(in_fp8: tuple[Path, Path]) -> None:
    before, after = tensors(in_fp8[0]), tensors(in_fp8[1])
    scaled = {name for name, tensor in after.items() if tensor.dtype == torch.float8_e4m3fn}
    assert set(after) == set(before) | {name + SCALE for name in scaled}
    whole = {name for name in before if name not in scaled}
    kept = ("norm.weight", "embed_tokens.weight", "lm_head.weight", "mlp.gate.weight", "bias")
    assert all(name.endswith(kept) for name in whole)
    assert not any(name.endswith(kept) for name in scaled)
    for name in scaled:
        assert after[name + SCALE].dtype == torch.float32
        back = dequantize_blocks(after[name], after[name + SCALE])
        assert (back - before[name]).norm() <= 0.04 * before[name].norm(), name
    config = json.loads((in_fp8[1] / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])
    index = json.loads((in_fp8[1] / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(after)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())


def test_an_export_that_sglang_would_refuse_says_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """tests/server/test_fp8_export.py has one that it takes."""
    sizes = {"head_dim": 64, "intermediate_size": 320}  # 256 and 128 rows of q, k, v are blocks
    folder = write_tiny_llama(tmp_path / "model", num_hidden_layers=1, **sizes)
    assert to_megatron(folder, tmp_path / "megatron") == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "fp8", "--dtype", "fp8", "--dry-run") == 0
    said = capfd.readouterr().err
    assert "it joins model.layers.0.mlp.gate_proj.weight and 1 more to others" in said
    assert to_hf(tmp_path / "megatron", tmp_path / "bf16", "--dry-run") == 0
    assert "SGLang" not in capfd.readouterr().err


def dequantized(folder: Path, output: Path) -> Path:
    """The same weights in fp32, by hand."""
    held = tensors(folder)
    plain = {
        name: dequantize_blocks(tensor, held[name + SCALE])
        if tensor.dtype == torch.float8_e4m3fn
        else tensor.float()
        for name, tensor in held.items()
        if not name.endswith(SCALE)
    }
    output.mkdir()
    save_file(plain, output / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (output / "config.json").write_text(json.dumps(config))
    return output


def test_fp8_is_dequantised_when_it_is_read(in_fp8: tuple[Path, Path], tmp_path: Path) -> None:
    folder = in_fp8[1]
    read_model(str(folder), "teacher")
    plain = dequantized(folder, tmp_path / "plain")
    assert to_megatron(folder, tmp_path / "megatron", "--dtype", "fp32") == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "back") == 0
    before, after = tensors(plain), tensors(tmp_path / "back")
    assert sorted(before) == sorted(after)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    (logits,) = run_ranks(1, prefix_logits, model_config(folder), 1)
    expected = transformers_logits(plain)
    assert (torch.cat(logits)[:, :61] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_transformers_reads_the_export_as_we_do(tmp_path: Path) -> None:
    """By its own reader of such folders, piece by piece: the whole needs ``accelerate``."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    sizes = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
    folder = write_tiny_llama(tmp_path / "model", **sizes)
    assert to_megatron(folder, tmp_path / "megatron") == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "fp8", "--dtype", "fp8") == 0
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    read = FineGrainedFP8Config.from_dict(config)
    assert (read.weight_block_size, read.activation_scheme) == ([128, 128], "dynamic")
    assert read.modules_to_not_convert == ["lm_head"]
    before, after = tensors(folder), tensors(tmp_path / "fp8")
    scaled = [name for name in after if name + SCALE in after]
    assert len(scaled) == 2 * 7
    for name in scaled:
        parts = {"weight$": after[name], "weight_scale_inv": after[name + SCALE]}
        theirs = Fp8Dequantize(None).convert(parts)["weight"]
        assert torch.equal(theirs, dequantize_blocks(after[name], after[name + SCALE]))
        # Between neighbours of e4m3: three bits behind the leading one, 2^-9 below 2^-6.
        block = after[name + SCALE].repeat_interleave(128, 0).repeat_interleave(128, 1)
        ulp = torch.maximum(before[name].abs() * 2**-3, block * 2**-9)
        assert ((theirs - before[name]).abs() <= ulp).all(), name


def test_a_student_in_fp8_is_refused(in_fp8: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match="is in FP8, and a student trains in bf16 or fp32"):
        read_model(str(in_fp8[1]), "student")


def test_a_scale_that_does_not_fit_is_named(
    in_fp8: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    held = tensors(in_fp8[1])
    name = "model.layers.0.self_attn.o_proj.weight" + SCALE
    held[name] = torch.ones(5, 5)
    folder = tmp_path / "in"
    folder.mkdir()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((in_fp8[1] / "config.json").read_text())
    code = to_megatron(folder, tmp_path / "out")
    check_refused(capfd, code, name, "F32 [5, 5], not F32 [2, 1]")
