"""Hugging Face checkpoints to Megatron-Core and back, one file a family."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_prefix.mcore.hf_map import llama, mixtral, qwen2, qwen3, qwen3_moe
from megatron_prefix.mcore.hf_map.units import DecoderShape, Unit

FAMILIES: dict[str, ModuleType] = {
    family.ARCHITECTURE: family for family in (llama, qwen2, qwen3, qwen3_moe, mixtral)
}


@dataclass(frozen=True)
class HfModel:
    """A checkpoint's family, sizes and name map; reads config.json alone."""

    path: Path
    config: dict[str, Any]
    shape: DecoderShape
    units: tuple[Unit, ...]
    settings: dict[str, Any]
    rope_scaling_factor: float


def read_hf_model(path: str) -> HfModel:
    """Read ``path``/config.json; ValueError for a family or a variant that is not supported."""
    config = json.loads((Path(path) / "config.json").read_text())
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise ValueError(
            f"{path}: architecture {architecture} is not supported; supported: "
            f"{', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[architecture]
    shape = DecoderShape.from_config(config)
    return HfModel(
        path=Path(path),
        config=config,
        shape=shape,
        units=tuple(family.units(shape, config)),
        settings=family.transformer_settings(shape, config),
        rope_scaling_factor=llama.rope_scaling_factor(config) if family is llama else 0.0,
    )
