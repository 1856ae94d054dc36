"""Model folders as users have them: whole, without weights, cut short, of another shape."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prefix.hf_folder import read_hf_folder
from megatron_prefix.mcore.source import open_source
from megatron_prefix.mcore.tensor_files import HfReader
from megatron_prefix.safetensors_files import INDEX, read_header
from megatron_prefix.validate import read_model
from tests.refused import refusal_of
from tests.tiny_models import write_tiny_llama, write_tiny_qwen3

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_qwen3(tmp_path / "qwen")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refusal(folder: Path) -> str:
    return refusal_of(read_model, str(folder), "student")


@pytest.mark.parametrize("write", [write_tiny_qwen3, write_tiny_llama])
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_writes_is_taken(
    write: Callable[..., Path], tied: bool, tmp_path: Path
) -> None:
    folder = write(tmp_path, tie_word_embeddings=tied)
    read_model(str(folder), "student")
    tensors = read_hf_folder(str(folder), "student").tensors
    assert tensors.keys() == load_file(folder / WEIGHTS).keys()
    entry = tensors["model.embed_tokens.weight"]
    assert (entry.shape, entry.dtype) == ((64, 64), "F32")


def split_in_two(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / shard)
    (folder / WEIGHTS).unlink()
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_together(folder: Path) -> None:
    whole = read_hf_folder(str(folder), "student").tensors.keys()
    split_in_two(folder)
    read_model(str(folder), "student")
    assert read_hf_folder(str(folder), "student").tensors.keys() == whole


def test_a_missing_shard_is_named(folder: Path) -> None:
    split_in_two(folder)
    (folder / "b.safetensors").unlink()
    assert "names files that are missing: b.safetensors" in refusal(folder)


def test_a_file_that_the_index_does_not_name_is_left_alone(folder: Path) -> None:
    name = "model.norm.weight"
    before = load_file(folder / WEIGHTS)
    split_in_two(folder)
    other = {name: 7 * before[name], "model.extra": torch.zeros(1)}
    save_file(other, folder / "consolidated.safetensors")
    read_model(str(folder), "student")
    assert torch.equal(HfReader(folder).tensor(name), before[name])


def test_of_a_tensor_in_two_files_the_indexs_counts(folder: Path) -> None:
    before = load_file(folder / WEIGHTS)
    split_in_two(folder)
    in_b = load_file(folder / "b.safetensors")
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    name = next(tensor for tensor, file in files.items() if file == "a.safetensors")
    save_file(in_b | {name: 7 * before[name]}, folder / "b.safetensors")
    read_model(str(folder), "student")
    assert torch.equal(HfReader(folder).tensor(name), before[name])


def test_a_tensor_in_two_files_of_which_no_index_says_is_named_with_both(folder: Path) -> None:
    name = "model.norm.weight"
    save_file({name: load_file(folder / WEIGHTS)[name]}, folder / "zz.safetensors")
    said = f"tensor {name} is in {WEIGHTS} and in zz.safetensors, and no {INDEX}"
    assert said in refusal(folder)
    assert said in refusal_of(HfReader, folder)


def test_what_an_index_names_and_no_file_holds_is_named(folder: Path) -> None:
    split_in_two(folder)
    index = json.loads((folder / INDEX).read_text())
    moved = next(name for name, file in index["weight_map"].items() if file == "a.safetensors")
    index["weight_map"] |= {"model.gone": "a.safetensors", moved: "b.safetensors"}
    (folder / INDEX).write_text(json.dumps(index))
    told = refusal(folder)
    assert f"{moved} in b.safetensors, model.gone in a.safetensors; fetch" in told
    assert told.removeprefix(f"student.hf_path={folder}") in refusal_of(HfReader, folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": ["a.safetensors"]}))
    assert "has no weight_map of files by tensor" in refusal(folder)


def test_a_truncated_file_is_named_with_both_sizes(folder: Path) -> None:
    path = folder / WEIGHTS
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    told = refusal(folder)
    assert f"{path} has {size - 10} bytes and its header speaks of {size}" in told


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        struct.pack("<Q", 2**60),
        struct.pack("<Q", 500) + b'{"a": {"dtype"',
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 10) + b'{"a": {}}  ',
    ],
)
def test_a_file_that_is_no_safetensors_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.safetensors .*fetch it again"):
        read_header(path)


def test_a_tensor_of_another_shape_is_named_with_both(folder: Path) -> None:
    change_config(folder, intermediate_size=100)
    told = refusal(folder)
    assert "model.layers.0.mlp.gate_proj.weight has shape [96, 64], not [100, 64]" in told
    assert "6 tensors are not as they must be" in told


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.k_norm.weight"))
    assert "model.layers.1.self_attn.k_norm.weight is missing" in refusal(folder)


def test_all_that_is_wrong_is_named_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.extra"] = torch.zeros(1)
        for layer, dtype in enumerate((torch.float8_e4m3fn, torch.float64)):
            name = f"model.layers.{layer}.mlp.up_proj.weight"
            tensors[name] = tensors[name].to(dtype)
        name = "model.layers.1.mlp.down_proj.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(2, 1)

    change_weights(folder, spoil)
    for told in (refusal(folder), refusal_of(open_source, folder)):
        assert "5 tensors are not as they must be" in told
        assert "model.norm.weight is missing" in told
        assert "model.extra has no place" in told
        assert "layers.0.mlp.up_proj.weight_scale_inv is missing, not F32 [1, 1]" in told
        assert "layers.1.mlp.up_proj.weight is F64, not one of" in told
        assert "layers.1.mlp.down_proj.weight_scale_inv is F32 [2, 1], not F32 [1, 1]" in told


def test_a_tensor_without_a_place_is_named(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.gate_proj.bias"] = torch.zeros(96)

    change_weights(folder, add)
    assert "model.layers.0.mlp.gate_proj.bias has no place" in refusal(folder)


def test_redundant_tensors_of_older_exporters_are_let_be(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = torch.zeros(64, 64)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)

    change_weights(folder, add)
    read_model(str(folder), "student")
    assert "lm_head.weight" in read_hf_folder(str(folder), "student").tensors


def test_pickled_weights_are_refused_with_the_way_out(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    told = refusal(folder)
    assert "pytorch_model.bin" in told and "save_pretrained" in told


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "has no weights (*.safetensors)" in refusal(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].to(torch.int8)

    change_weights(folder, quantise)
    assert "model.layers.0.mlp.up_proj.weight is I8, not one of F32" in refusal(folder)
    change_config(folder, quantization_config={"quant_method": "fp8"})
    assert "is quantised" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported; supported: "),
        ({"architectures": None}, "names no architecture"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None"),
        ({"hidden_size": "64"}, "hidden_size='64'"),
        ({"num_key_value_heads": 3}, "is no multiple of num_key_value_heads=3"),
        ({"head_dim": None, "hidden_size": 66}, "config.json gives no head_dim"),
        ({"rms_norm_eps": None}, "has no rms_norm_eps"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(folder, **changes)
    assert message in refusal(folder)


def test_both_supported_families_are_listed(folder: Path) -> None:
    change_config(folder, architectures=["Other"])
    told = refusal(folder)
    assert "LlamaForCausalLM" in told and "Qwen3ForCausalLM" in told


def test_a_broken_or_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json is no JSON" in refusal(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)


def test_a_hub_id_is_told_how_to_be_fetched() -> None:
    with pytest.raises(ValueError, match="hf download Qwen/Qwen3-0.6B --local-dir"):
        read_hf_folder("Qwen/Qwen3-0.6B", "teacher")
    for folder in ("models/none", "/nowhere", "./none", "a/folder/deeper"):
        with pytest.raises(ValueError, match=f"hf download OWNER/NAME --local-dir {folder}"):
            read_hf_folder(folder, "teacher")
    with pytest.raises(ValueError, match="teacher.hf_path is not set"):
        read_hf_folder("", "teacher")


def test_a_llama_without_its_rope_numbers_is_named(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path)
    change_config(folder, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4})
    assert "config.json has no 'low_freq_factor'" in refusal(folder)
