"""A Hugging Face model folder as it lies on disk, read without loading one weight.

A missing shard, a truncated download or a tensor of another shape is found before any server or
rank starts (``safetensors_files.py``).
"""

from collections.abc import Mapping, Sequence
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
    problems: tuple[str, ...] = ()  # of tensors, by their headers alone; tensor_problems has more


def read_hf_folder(hf_path: str, owner: str, *, only_to_look: bool = False) -> HfFolder:
    """Config and tensor table of ``hf_path``; ``owner`` ("student", "teacher") is for messages.

    ValueError for a folder that is missing, without weights, incomplete, truncated, pickled, or
    quantised in another way than DeepSeek's FP8 or GPT-OSS's MXFP4 (not with ``only_to_look``); a
    student must not be quantised at all. A weight in MXFP4 counts as one tensor. Whether the
    tensors are what they must be is for :func:`check_tensors`.
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
    config = _read_config(path, where)
    if not only_to_look:
        _check_quantization(config.get("quantization_config") or {}, where, owner)
    tensors, problems = _join_mxfp4(tensor_table(path, where))
    problems += [
        f"{name} is {entry.dtype}, not one of {', '.join(DTYPES)}"
        for name, entry in tensors.items()
        if entry.dtype not in DTYPES
    ]
    return HfFolder(path, config, tensors, (*problems, *_scale_problems(tensors)))


def check_tensors(
    folder: HfFolder,
    expected: Mapping[str, tuple[int, ...]],
    owner: str,
    skipped: tuple[str, ...] = (),
) -> None:
    """ValueError that names every tensor missing, of another shape or dtype, or unknown. Names that
    start as one of ``skipped`` does may be there."""
    if problems := tensor_problems(folder, expected, skipped):
        raise ValueError(f"{owner}.hf_path={folder.path}: {not_as_they_must_be(problems)}")


def tensor_problems(
    folder: HfFolder, expected: Mapping[str, tuple[int, ...]], skipped: tuple[str, ...] = ()
) -> list[str]:
    """Every tensor that is not as ``expected`` says, with what is wrong."""
    found = [f"{name} is missing" for name in expected if name not in folder.tensors]
    for name, entry in folder.tensors.items():
        if name in expected and entry.shape != tuple(expected[name]):
            found.append(f"{name} has shape {list(entry.shape)}, not {list(expected[name])}")
        tied_head = name == "lm_head.weight" and folder.config.get("tie_word_embeddings")
        known = name in expected or name.startswith(skipped) or name.endswith(REDUNDANT)
        if not known and not tied_head and not is_scale(folder.tensors, name):
            found.append(f"{name} has no place in a {folder.config['architectures'][0]}")
    return [*found, *folder.problems]


def not_as_they_must_be(problems: Sequence[str]) -> str:
    return (
        f"{len(problems)} tensors are not as they must be: {'; '.join(problems)}; give the "
        "checkpoint that config.json describes, before quantisation"
    )


def is_scale(tensors: Mapping[str, TensorEntry], name: str) -> bool:
    """Whether ``name`` holds the scales of an FP8 weight of the folder."""
    weight = tensors.get(name.removesuffix(SCALE))
    return name.endswith(SCALE) and weight is not None and weight.dtype == "F8_E4M3"


def _scale_problems(tensors: Mapping[str, TensorEntry]) -> list[str]:
    problems = []
    for name, entry in tensors.items():
        wanted = tuple(-(-size // BLOCK) for size in entry.shape)
        scale = tensors.get(name + SCALE)
        if entry.dtype == "F8_E4M3" and (
            scale is None or scale.dtype != "F32" or scale.shape != wanted
        ):
            problems.append(f"{name + SCALE} is {_found(scale)}, not F32 {list(wanted)}")
    return problems


def _found(entry: TensorEntry | None) -> str:
    return f"{entry.dtype} {list(entry.shape)}" if entry else "missing"


def _join_mxfp4(
    tensors: Mapping[str, TensorEntry],
) -> tuple[dict[str, TensorEntry], list[str]]:
    """The weight [E, 32 * G, R] in place of its blocks [E, R, G, 16] and scales [E, R, G]; and what
    cannot be joined."""
    joined, problems = dict(tensors), []
    for name, blocks in tensors.items():
        if not (name.endswith(MXFP4_BLOCKS) and blocks.dtype == "U8"):
            continue
        weight = name.removesuffix(MXFP4_BLOCKS)
        scales = tensors.get(weight + MXFP4_SCALES)
        *grid, size = blocks.shape
        if size != MXFP4_BYTES or len(grid) != 3:
            problems.append(f"{name} is {_found(blocks)}, not [E, R, G, {MXFP4_BYTES}]")
        elif scales is None or (scales.dtype, list(scales.shape)) != ("U8", grid):
            problems.append(f"{weight + MXFP4_SCALES} is {_found(scales)}, not U8 {grid}")
        # Named once, where it is wrong: the rest of it counts as there.
        del joined[name]
        joined.pop(weight + MXFP4_SCALES, None)
        experts, rows, groups = grid if len(grid) == 3 else (0, 0, 0)
        shape = (experts, 2 * MXFP4_BYTES * groups, rows)
        joined[weight] = TensorEntry("MXFP4", shape, blocks.file, blocks.start)
    return joined, problems


def _read_config(path: Path, where: str) -> dict[str, Any]:
    config = read_json(path / "config.json", where)
    architectures = config.get("architectures")
    if not (isinstance(architectures, list) and architectures):
        raise ValueError(f"{where}: config.json names no architecture; add `architectures`")
    return config


def is_readable(quantization: Mapping[str, Any]) -> bool:
    """Whether weights of config.json's ``quantization_config`` can be dequantised here."""
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    return method == "mxfp4" or method == "fp8" and block == [BLOCK, BLOCK]


def _check_quantization(quantization: Mapping[str, Any], where: str, owner: str) -> None:
    method, known = quantization.get("quant_method"), is_readable(quantization)
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
