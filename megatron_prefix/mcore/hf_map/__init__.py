"""Hugging Face checkpoints to Megatron-Core and back, one file a family."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_prefix.mcore.hf_map import (
    deepseek_v2,
    deepseek_v3,
    gpt_oss,
    llama,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from megatron_prefix.mcore.hf_map.shape import DecoderShape
from megatron_prefix.mcore.hf_map.units import Unit

logger = logging.getLogger(__name__)

FAMILIES: dict[str, ModuleType] = {
    family.ARCHITECTURE: family
    for family in (llama, qwen2, qwen3, qwen3_moe, mixtral, deepseek_v2, deepseek_v3, gpt_oss)
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

    @property
    def latent_attention(self) -> bool:
        """Whether its attention is DeepSeek's (MLA)."""
        return bool(self.settings.get("multi_latent_attention"))

    @property
    def skipped(self) -> tuple[str, ...]:
        """Prefixes of tensors that lie in the folder and are not the model's: the layers that
        predict several tokens ahead (MTP), numbered after the last."""
        count = int(self.config.get("num_nextn_predict_layers") or 0)
        return tuple(f"model.layers.{self.shape.num_layers + i}." for i in range(count))

    def report_skipped(self, tensors: Iterable[str]) -> None:
        """A warning with how many of ``tensors``, names, are not used."""
        if self.skipped and (count := sum(name.startswith(self.skipped) for name in tensors)):
            logger.warning(
                "%s: %d tensors of multi-token prediction (%s*) are skipped: they are neither "
                "trained nor exported",
                self.path,
                count,
                "*, ".join(self.skipped),
            )


def read_hf_model(path: str) -> HfModel:
    """Read ``path``/config.json; ValueError for a family or a variant that is not supported."""
    return hf_model(path, json.loads((Path(path) / "config.json").read_text()))


def hf_model(path: str, config: dict[str, Any]) -> HfModel:
    """The model of ``config``, which need not lie at ``path``; ValueError as for a folder's."""
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


def served_model(path: str, config: dict[str, Any]) -> HfModel:
    """The sizes of a model that another engine holds, of any family: no tensor of it is mapped.

    A model of several parts is taken for its text's. KeyError names a size that is missing.
    """
    config = {"architectures": config["architectures"], **(config.get("text_config") or config)}
    # Not every family has it, and no one here computes a norm of this model.
    shape = DecoderShape.from_config({"rms_norm_eps": 0.0, **config})
    return HfModel(Path(path), config, shape, units=(), settings={}, rope_scaling_factor=0.0)
