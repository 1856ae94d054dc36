"""Writes a model's shards as a Hugging Face folder, bucket by bucket."""

import json
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_prefix.mcore.model import MegatronModel
from megatron_prefix.mcore.weights import hf_buckets

SHARD_BYTES = 4 * 2**30
# What makes a folder usable beside its weights; copied where the source has it.
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def export_hf(model: MegatronModel, folder: Path, dtype: torch.dtype) -> None:
    """Write ``model`` to ``folder`` as safetensors in ``dtype``. Collective; rank 0 writes.

    Written beside it and renamed when whole: ``folder`` is never half a model. Rank 0 holds one
    shard of at most 4 GiB (or one bucket) at a time.
    """
    partial = folder.with_name(folder.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    files: dict[str, str] = {}
    for number, bucket in enumerate(hf_buckets(model, SHARD_BYTES, dtype), 1):
        if bucket:
            name = f"model-{number:05d}.safetensors"
            tensors = {key: tensor.cpu() for key, tensor in bucket}
            save_file(tensors, partial / name, metadata={"format": "pt"})
            files |= dict.fromkeys(tensors, name)
    if dist.get_rank() == 0:
        _finish(model, partial, files, dtype)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def _finish(model: MegatronModel, folder: Path, files: dict[str, str], dtype: torch.dtype) -> None:
    index = {"metadata": {}, "weight_map": dict(sorted(files.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = {**model.hf.config, "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in COMPANIONS:
        if (model.hf.path / name).exists():
            shutil.copyfile(model.hf.path / name, folder / name)
