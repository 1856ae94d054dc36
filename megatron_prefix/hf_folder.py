"""A Hugging Face model folder as it lies on disk, read without loading one weight.

A missing shard, a truncated download or a tensor of another shape is found before any server or
rank starts (``safetensors_files.py``).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prefix.safetensors_files import TensorEntry, read_json, tensor_table

DTYPES = ("F32", "BF16", "F16", "F8_E4M3", "MXFP4")
SCALE = "_scale_inv"  # behind the name of an FP8 weight: its scales, one a block of 128 x 128
BLOCK = 128
# Behind the name of a weight in MXFP4: values and scales (mcore/mxfp4.py).
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"
MXFP4_BYTES = 16  # of a block of 32 values
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
# Written by older exporters beside the weights: derived from the config, or tied to another.
REDUNDANT = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias")


@dataclass(frozen=True)
class HfFolder:
    path: Path
    config: dict[str, Any]  # config.json
    tensors: Mapping[str, TensorEntry]


def read_hf_folder(hf_path: str, owner: str) -> HfFolder:
    """Config and tensor table of ``hf_path``; ``owner`` ("student", "teacher") is for messages.

    ValueError for a folder that is missing, without weights, incomplete, truncated, pickled, or
    quantised in another way than DeepSeek's FP8 or GPT-OSS's MXFP4; a student must not be quantised
    at all. A weight in MXFP4 counts as one tensor. Whether the tensors are the architecture's is
    for :func:`check_tensors`.
    """
    if not hf_path:
        raise ValueError(f"{owner}.hf_path is not set; give the folder of a checkpoint")
    path, where = Path(hf_path), f"{owner}.hf_path={hf_path}"
    if not path.is_dir():
        # models/ is where the recipes of this project look.
        first = hf_path.split("/")[0]
        is_name = hf_path.count("/") == 1 and first not in ("", ".", "..", "~", "models")
        name, folder = (hf_path, "FOLDER") if is_name else ("OWNER/NAME", hf_path)
        raise ValueError(
            f"{where} is no folder; a model of the hub is fetched with "
            f"`hf download {name} --local-dir {folder}`"
        )
    config = _read_config(path, where, owner)
    tensors = _join_mxfp4(tensor_table(path, where), where)
    for name, entry in tensors.items():
        if entry.dtype not in DTYPES:
            raise ValueError(
                f"{where}: tensor {name} is {entry.dtype}; only {', '.join(DTYPES)} can be "
                "trained, so give the checkpoint before quantisation"
            )
    _check_scales(tensors, where)
    return HfFolder(path, config, tensors)


def check_tensors(
    folder: HfFolder,
    expected: Mapping[str, tuple[int, ...]],
    owner: str,
    skipped: tuple[str, ...] = (),
) -> None:
    """ValueError that names the first tensor missing, of another shape, or unknown. Names that
    start as one of ``skipped`` does may be there."""
    where = f"{owner}.hf_path={folder.path}"
    for name, shape in expected.items():
        entry = folder.tensors.get(name)
        if entry is None:
            raise ValueError(
                f"{where}: tensor {name} is in none of its safetensors files; fetch the "
                "checkpoint again or give the one that config.json describes"
            )
        if entry.shape != tuple(shape):
            raise ValueError(
                f"{where}: tensor {name} in {entry.file.name} has shape {list(entry.shape)} and "
                f"config.json says {list(shape)}; give the config.json of this checkpoint"
            )
    for name in folder.tensors:
        tied_head = name == "lm_head.weight" and folder.config.get("tie_word_embeddings")
        known = name in expected or name.startswith(skipped) or name.endswith(REDUNDANT)
        if not known and not tied_head and not is_scale(folder.tensors, name):
            raise ValueError(
                f"{where}: tensor {name} has no place in a "
                f"{folder.config['architectures'][0]}; give a checkpoint without it"
            )


def is_scale(tensors: Mapping[str, TensorEntry], name: str) -> bool:
    """Whether ``name`` holds the scales of an FP8 weight of the folder."""
    weight = tensors.get(name.removesuffix(SCALE))
    return name.endswith(SCALE) and weight is not None and weight.dtype == "F8_E4M3"


def _check_scales(tensors: Mapping[str, TensorEntry], where: str) -> None:
    for name, entry in tensors.items():
        if entry.dtype != "F8_E4M3":
            continue
        wanted = tuple(-(-size // BLOCK) for size in entry.shape)
        scale = tensors.get(name + SCALE)
        if scale is None or scale.dtype != "F32" or scale.shape != wanted:
            found = f"{scale.dtype} {list(scale.shape)}" if scale else "missing"
            raise ValueError(
                f"{where}: {name + SCALE} is {found}, not F32 {list(wanted)}; only FP8 with blocks "
                "of 128 x 128 is read, so give the checkpoint before quantisation"
            )


def _join_mxfp4(tensors: Mapping[str, TensorEntry], where: str) -> dict[str, TensorEntry]:
    """The weight [E, 32 * G, R] in place of its blocks [E, R, G, 16] and scales [E, R, G]."""
    joined = dict(tensors)
    for name, blocks in tensors.items():
        if not (name.endswith(MXFP4_BLOCKS) and blocks.dtype == "U8"):
            continue
        weight = name.removesuffix(MXFP4_BLOCKS)
        scales = tensors.get(weight + MXFP4_SCALES)
        *grid, size = blocks.shape
        if scales is None or (scales.dtype, list(scales.shape)) != ("U8", grid) or len(grid) != 3:
            found = f"{scales.dtype} {list(scales.shape)}" if scales else "missing"
            raise ValueError(
                f"{where}: {weight + MXFP4_SCALES} is {found}, not U8 {grid} beside {name}; fetch "
                "the checkpoint again"
            )
        if size != MXFP4_BYTES:
            raise ValueError(f"{where}: {name} has blocks of {2 * size} values; MXFP4 has 32")
        experts, rows, groups = grid
        del joined[name], joined[weight + MXFP4_SCALES]
        shape = (experts, 2 * MXFP4_BYTES * groups, rows)
        joined[weight] = TensorEntry("MXFP4", shape, blocks.file, blocks.start)
    return joined


def _read_config(path: Path, where: str, owner: str) -> dict[str, Any]:
    config = read_json(path / "config.json", where)
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures):
        raise ValueError(f"{where}: config.json names no architecture; add `architectures`")
    quantization = config.get("quantization_config") or {}
    method = quantization.get("quant_method")
    known = method == "mxfp4"
    known = known or method == "fp8" and quantization.get("weight_block_size") == [BLOCK, BLOCK]
    if known and owner == "student":
        raise ValueError(
            f"{where} is in {str(method).upper()}, and a student trains in bf16 or fp32; "
            "dequantise it with tools/convert_hf_to_megatron.py and "
            "tools/convert_megatron_to_hf.py"
        )
    if quantization and not known:
        block = quantization.get("weight_block_size")
        blocks = f" with weight_block_size={block}" if block else ""
        raise ValueError(
            f"{where} is quantised (quant_method={method!r}{blocks} in config.json); give the "
            f"checkpoint before quantisation, or one in mxfp4 or in fp8 with blocks of {BLOCK} x "
            f"{BLOCK}"
        )
    return config


def check_sizes(folder: HfFolder, owner: str) -> None:
    """ValueError where config.json lacks a size of a dense decoder, or holds one that cannot be."""
    config, where = folder.config, f"{owner}.hf_path={folder.path}"
    for key in _SIZES:
        value = config.get(key)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: config.json has {key}={value!r}; it must be 1 or more")
    if not isinstance(config.get("rms_norm_eps"), float):
        raise ValueError(f"{where}: config.json has no rms_norm_eps; give the published config")
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise ValueError(
            f"{where}: num_attention_heads={heads} is no multiple of num_key_value_heads={groups}"
        )
    if not config.get("head_dim") and config["hidden_size"] % heads:
        raise ValueError(
            f"{where}: hidden_size={config['hidden_size']} is no multiple of "
            f"num_attention_heads={heads}, and config.json gives no head_dim"
        )
    if (act := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"{where}: hidden_act={act!r} is not supported; supported: silu")
