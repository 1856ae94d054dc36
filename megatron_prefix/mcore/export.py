"""Writes a model's shards as a Hugging Face folder, bucket by bucket."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_prefix.mcore.folders import PARTIAL, new_folder
from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.weights import hf_buckets

SHARD_BYTES = 4 * 2**30
# What makes a folder usable beside its weights; copied where the source has it.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "tekken.json",
    "spiece.model",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
    "NOTICE*",
)
INDEX = "model.safetensors.index.json"
OnBytes = Callable[[int], object]
Bucket = list[tuple[str, Tensor]]


def export_hf(
    model: MegatronModel,
    folder: Path,
    dtype: torch.dtype,
    *,
    on_bytes: OnBytes | None = None,
    on_bucket: Callable[[], object] = lambda: None,
    verify: bool = False,
) -> None:
    """Write ``model`` to ``folder`` as safetensors in ``dtype``. Collective; rank 0 writes.

    See :func:`exported_buckets`: this is for whoever wants the folder alone. ``on_bucket`` is told
    on every rank that one more is done.
    """
    for _ in exported_buckets(model, folder, dtype, on_bytes=on_bytes, verify=verify):
        on_bucket()


def exported_buckets(
    model: MegatronModel,
    folder: Path,
    dtype: torch.dtype,
    *,
    on_bytes: OnBytes | None = None,
    verify: bool = False,
    durable: bool = True,
) -> Iterator[Bucket]:
    """The buckets of ``model``, as :func:`hf_buckets` gives them, each written to ``folder`` before
    it passes on; the folder is there when the last one has been taken. Collective.

    Written beside it and renamed when whole: ``folder`` is never half a model. Rank 0 holds one
    shard of at most 4 GiB (or one bucket) at a time. ``on_bytes`` is told on rank 0 of each shard's
    size. With ``verify`` the files are read back and compared with the model before the renaming.
    ``durable`` as of ``new_folder``.
    """
    with contextlib.ExitStack() as stack:
        if dist.get_rank() == 0:
            partial = stack.enter_context(new_folder(folder, durable=durable))
            writer = _Writer(partial, on_bytes)
        for bucket in hf_buckets(model, SHARD_BYTES, dtype):
            if bucket:
                writer.write({key: tensor.cpu() for key, tensor in bucket})
            yield bucket
        if dist.get_rank() == 0:
            writer.finish(model, dtype)
        if verify:
            verify_export(model, folder.with_name(folder.name + PARTIAL), dtype)
    dist.barrier()


class _Writer:
    """The files of one folder, on rank 0."""

    def __init__(self, folder: Path, on_bytes: OnBytes | None) -> None:
        self._folder, self._on_bytes = folder, on_bytes
        self._shards: list[list[str]] = []  # names in each file
        self._bytes = 0

    def write(self, tensors: dict[str, Tensor]) -> None:
        self._shards.append(list(tensors))
        name = f"model-{len(self._shards):05d}.safetensors"
        save_file(tensors, self._folder / name, metadata={"format": "pt"})
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._bytes += size
        if self._on_bytes is not None:
            self._on_bytes(size)

    def finish(self, model: MegatronModel, dtype: torch.dtype) -> None:
        """Names with the number of files in them, the index, the config and what goes along."""
        files: dict[str, str] = {}
        for number, names in enumerate(self._shards, 1):
            final = f"model-{number:05d}-of-{len(self._shards):05d}.safetensors"
            (self._folder / f"model-{number:05d}.safetensors").rename(self._folder / final)
            files |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(files.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=1))
        config = exported_config(model.hf.config, dtype)
        (self._folder / "config.json").write_text(json.dumps(config, indent=1))
        copy_companions(model.hf.path, self._folder)


def exported_config(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config.json of what is written: its precision, no layers that are skipped, and no code:
    ``auto_map`` names files that are not copied, and every family here is transformers' own."""
    exported = {**config, "dtype": str(dtype).removeprefix("torch.")}
    exported.pop("torch_dtype", None)
    exported.pop("quantization_config", None)
    exported.pop("auto_map", None)
    if "num_nextn_predict_layers" in exported:
        exported["num_nextn_predict_layers"] = 0
    return exported


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy all that goes along with weights and config; returns the names."""
    found = sorted({path for pattern in COMPANIONS for path in source.glob(pattern)})
    for path in found:
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)
    return [path.name for path in found]


def verify_export(model: MegatronModel, folder: Path, dtype: torch.dtype) -> None:
    """Read ``folder`` back and compare it with ``model`` bit for bit. Collective; RuntimeError on
    rank 0 names what differs (a disk that lies, memory that flips)."""
    wrong: list[str] = []
    for bucket in hf_buckets(model, SHARD_BYTES, dtype):
        if bucket:
            files = json.loads((folder / INDEX).read_text())["weight_map"]
            wrong += [
                name
                for name, tensor in bucket
                if not torch.equal(_read(folder / files[name], name), tensor.cpu())
            ]
    if wrong:
        raise RuntimeError(f"{folder}: read back otherwise than written: {', '.join(wrong)}")


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
