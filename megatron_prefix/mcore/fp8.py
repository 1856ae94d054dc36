"""FP8 settings, validated here because Megatron-Core accepts any name.

Sources: Transformer Engine's recipes; blockwise (128x128, DeepSeek style) needs CUDA 12.9 and
Hopper, mxfp8 and nvfp4 need Blackwell.
"""

import importlib.util
from typing import Any

import torch

from megatron_prefix.config import Fp8Config

FORMATS = ("off", "e4m3", "hybrid")
RECIPES = ("blockwise", "tensorwise", "delayed")
BLACKWELL_ONLY = ("mxfp8", "nvfp4")
SEQUENCE_MULTIPLE = 128  # blockwise wants token counts divisible by 128


def fp8_settings(fp8: Fp8Config, owner: str) -> dict[str, Any]:
    """TransformerConfig fields; ValueError where the card, the package or the name cannot."""
    if fp8.format == "off":
        return {}
    refuse_names(fp8, owner)
    refuse_machine(fp8, owner)
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_param": False,
        "first_last_layers_bf16": fp8.first_last_layers_bf16,
    }


def refuse_names(fp8: Fp8Config, owner: str) -> None:
    if fp8.format not in FORMATS:
        raise ValueError(f"{owner}.fp8.format={fp8.format!r} is not one of {', '.join(FORMATS)}")
    if fp8.recipe not in RECIPES + BLACKWELL_ONLY:
        raise ValueError(f"{owner}.fp8.recipe={fp8.recipe!r} is not one of {', '.join(RECIPES)}")
    if fp8.recipe == "delayed" and fp8.first_last_layers_bf16:
        raise ValueError(
            f"{owner}.fp8.first_last_layers_bf16=true does not go with recipe 'delayed'; set it to "
            "false or take 'blockwise'"
        )


def refuse_machine(fp8: Fp8Config, owner: str) -> None:
    if not torch.cuda.is_available():
        raise ValueError(
            f"{owner}.fp8.format={fp8.format!r} needs an NVIDIA GPU and this machine has none; set "
            f"{owner}.fp8.format=off"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            f"{owner}.fp8.format={fp8.format!r} needs Transformer Engine; install it with "
            "pip install 'megatron-prefix[gpu]'"
        )
    major, minor = torch.cuda.get_device_capability()
    card = torch.cuda.get_device_name()
    if (major, minor) < (8, 9):
        raise ValueError(f"{owner}.fp8: {card} (compute {major}.{minor}) has no FP8 units")
    if fp8.recipe in BLACKWELL_ONLY and major < 10:
        raise ValueError(
            f"{owner}.fp8.recipe={fp8.recipe!r} needs a Blackwell card and this is {card}; take "
            "'blockwise' or 'tensorwise'"
        )
    if fp8.recipe == "blockwise" and major < 9:
        raise ValueError(
            f"{owner}.fp8.recipe='blockwise' needs Hopper or newer and this is {card}; take "
            "'tensorwise' or 'delayed'"
        )
