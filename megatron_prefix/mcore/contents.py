"""What is in a checkpoint folder, Hugging Face's or Megatron's, without loading a weight."""

import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megatron_prefix.hf_folder import HfFolder, is_readable, read_hf_folder, tensor_problems
from megatron_prefix.layout import saved_layout
from megatron_prefix.mcore.dist_keys import VOCABULARY
from megatron_prefix.mcore.forks import OnBytes
from megatron_prefix.mcore.hf_map import FAMILIES
from megatron_prefix.mcore.hf_map.units import hf_tensors
from megatron_prefix.mcore.manifest import MANIFEST, RUN_STATE, damage
from megatron_prefix.mcore.source import open_config
from megatron_prefix.mcore.steps import SavedTensor, find_step, saved_tensors, saved_weights

logger = logging.getLogger(__name__)

RECORD = "recipe.yaml"  # a run's resolved recipe


@dataclass(frozen=True)
class MegatronContents:
    """What the folder of one saved step holds; no weight is read for it."""

    path: Path
    run_state: Mapping[str, Any]
    weights: Mapping[str, SavedTensor]
    optimizer_tensors: int

    @property
    def params_dtype(self) -> str:
        """bf16 | fp32, of the embedding."""
        return "fp32" if self.weights[VOCABULARY[0]].dtype == torch.float32 else "bf16"

    @property
    def parameters(self) -> int:
        """Weights with the vocabulary's padding."""
        return sum(prod(tensor.shape) for tensor in self.weights.values())


def read_step(path: Path) -> MegatronContents:
    """ValueError for a folder that holds no whole checkpoint of a step."""
    try:
        run_state = json.loads((path / RUN_STATE).read_text())
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"{path} is no whole Megatron checkpoint: {words}") from error
    if not (isinstance(run_state, dict) and isinstance(run_state.get("step"), int)):
        raise ValueError(f"{path / RUN_STATE} says no step; give a checkpoint that is whole")
    weights, tensors = saved_weights(path), saved_tensors(path)
    if VOCABULARY[0] not in weights:
        raise ValueError(f"{path} holds no {VOCABULARY[0]}; give a checkpoint of a GPT model")
    return MegatronContents(
        path=path,
        run_state=run_state,
        weights=weights,
        optimizer_tensors=len(tensors) - len(weights),
    )


def find_hf_model(step: Path) -> Path:
    """The folder of config and tokenizer that a step was converted or trained from."""
    beside = step.parent / "hf"
    if (beside / "config.json").is_file():
        return beside
    record = step.parent.parent / RECORD
    if record.is_file():
        from megatron_prefix.recipe import load_record

        return Path(load_record(record).student.hf_path)
    raise ValueError(f"neither {beside} nor {record} says which model this is; give --hf-model")


def check_manifest(step: Path, on_bytes: OnBytes = lambda size: None) -> int:
    """Verify the sum of every file; returns how many. ValueError names what does not match.

    0, with a warning, for a checkpoint that was saved without sums.
    """
    if not (step / MANIFEST).is_file():
        logger.warning(
            "%s has no %s, as with checkpoint.verify_integrity=false: its files are not verified",
            step,
            MANIFEST,
        )
        return 0
    if problem := damage(step, on_bytes):
        raise ValueError(f"{step} does not verify: {problem}")
    return len(json.loads((step / MANIFEST).read_text())["files"])


def verify(step: Path) -> int:
    """``check_manifest`` under a progress bar."""
    from megatron_prefix.mcore.progress_bar import byte_progress

    size = sum(file.stat().st_size for file in step.iterdir() if file.name != MANIFEST)
    with byte_progress("verifying", size, show=(step / MANIFEST).is_file()) as advance:
        return check_manifest(step, advance)


def find_contents(path: Path) -> Path:
    """``path`` where it is a Hugging Face folder, else the step's folder in it; ValueError where
    it is neither."""
    return path if (path / "config.json").is_file() else find_step(path, None, "")


def describe(path: Path, *, checksums: bool = True) -> dict[str, Any]:
    """What is in ``path``, JSON-ready, for either kind. ValueError where it is neither."""
    found = find_contents(path)
    if (found / "config.json").is_file():
        return _describe_hf(read_hf_folder(str(found), "model", only_to_look=True))
    return _describe_megatron(found, checksums)


def _describe_hf(folder: HfFolder) -> dict[str, Any]:
    architecture = folder.config["architectures"][0]
    quantization = folder.config.get("quantization_config") or {}
    readable = not quantization or is_readable(quantization)
    supported = architecture in FAMILIES and readable
    sizes = {entry.file: entry.file.stat().st_size for entry in folder.tensors.values()}
    found: dict[str, Any] = {
        "kind": "Hugging Face",
        "family": architecture,
        "supported": supported,
        "quantization": quantization.get("quant_method", "unknown") if quantization else "none",
        # Of weights that are packed in another way, sizes say little.
        "parameters": sum(prod(entry.shape) for entry in folder.tensors.values())
        if readable
        else "unknown",
        "tensors": len(folder.tensors),
        "precision": dict(Counter(entry.dtype for entry in folder.tensors.values())),
        "files": len(sizes),
        "bytes": sum(sizes.values()),
        "largest_file": max(sizes.values()),
        "headers": "whole",
    }
    if supported:
        hf = open_config(folder.path)
        found["problems"] = tensor_problems(folder, hf_tensors(hf.units), hf.skipped)
    return found


def _describe_megatron(step: Path, checksums: bool) -> dict[str, Any]:
    saved = read_step(step)
    files = [file for file in step.rglob("*") if file.is_file()]
    return {
        "kind": "Megatron",
        "family": _family(step),
        "step": saved.run_state["step"],
        "policy_version": saved.run_state.get("policy_version"),
        "layout": saved_layout(saved.run_state) or None,
        "parameters": saved.parameters,
        "tensors": len(saved.weights),
        "precision": dict(
            Counter(str(t.dtype).removeprefix("torch.") for t in saved.weights.values())
        ),
        "optimizer_tensors": saved.optimizer_tensors,
        "files": len(files),
        "bytes": sum(file.stat().st_size for file in files),
        "checksums": _checksums(step) if checksums else "not looked at",
    }


def _checksums(step: Path) -> str:
    verified = verify(step)
    return f"{verified} files verified" if verified else "none were saved"


def _family(step: Path) -> str:
    try:
        config = json.loads((find_hf_model(step) / "config.json").read_text())
        return str(config["architectures"][0])
    except (ValueError, OSError, KeyError) as error:
        return f"unknown: {error}"
