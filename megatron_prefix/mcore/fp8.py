"""FP8 settings, validated here because Megatron-Core accepts any name.

Sources: Transformer Engine's recipes; blockwise (128x128, DeepSeek style) needs CUDA 12.9 and
Hopper, mxfp8 and nvfp4 need Blackwell.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from megatron_prefix.config import Fp8Config, ModelConfig
from megatron_prefix.layout import Layout
from megatron_prefix.mcore.hf_map.shape import DecoderShape

if TYPE_CHECKING:
    from megatron.core.transformer import TransformerConfig

FORMATS = ("off", "e4m3", "hybrid")
RECIPES = ("blockwise", "tensorwise", "delayed")
BLACKWELL_ONLY = ("mxfp8", "nvfp4")
BLOCKWISE_CUDA = (12, 9)  # what Transformer Engine 2.20 asks for
_UNPICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"  # read by Transformer Engine at each load
SEQUENCE_MULTIPLE = 128  # blockwise wants token counts divisible by 128


def fp8_settings(fp8: Fp8Config, owner: str, *, own_scales: bool) -> dict[str, Any]:
    """TransformerConfig fields; ValueError where the card, the package or the name cannot."""
    if fp8.format == "off":
        return {}
    refuse_names(fp8, owner)
    refuse_machine(fp8, owner)
    return fp8_fields(fp8, own_scales=own_scales)


def fp8_fields(fp8: Fp8Config, *, own_scales: bool) -> dict[str, Any]:
    """TransformerConfig fields of settings that were checked; those not named keep its defaults,
    one layer at each end in bf16 among them.

    ``own_scales``: with delayed scaling, that each rank takes the amax of its own tensors. Megatron
    reduces it over one process-wide group, of all ranks or (``tp_only_amax_red``) of those that
    were made its tensor-parallel ranks: :func:`initialize_megatron` makes each rank one of its own.
    """
    return {
        "fp8": fp8.format,
        "fp8_recipe": fp8.recipe,
        "fp8_param": False,
        "first_last_layers_bf16": fp8.first_last_layers_bf16,
        "tp_only_amax_red": own_scales and fp8.recipe == "delayed",
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


def refuse_delayed(model: ModelConfig, owner: str, *, beside: bool) -> None:
    """ValueError where delayed scaling's history would be wrong. ``beside``: other ranks than the
    student's are in the world.

    A teacher's would stand still: Transformer Engine moves the scales on leaving its context only
    where gradients are enabled. Megatron reduces amax over the whole world, whose ranks must then
    all hold the same layers and run them; where they do not, each rank keeps scales of its own
    (:func:`fp8_fields`). Tensor-parallel ranks cannot: Transformer Engine gathers their inputs
    as of one scale, and a checkpoint holds the scales of the first of them alone.
    """
    if model.fp8.format == "off" or model.fp8.recipe != "delayed":
        return
    if owner.startswith("teacher"):
        raise ValueError(
            f"{owner}.fp8.recipe='delayed' never moves its scales in a model that runs forward "
            "only; take 'tensorwise', the same format with each tensor's own scale, or 'blockwise'"
        )
    stages, tp = model.pipeline_model_parallel_size, model.tensor_model_parallel_size
    if tp > 1 and (stages > 1 or beside):
        others = f"{stages} pipeline stages" if stages > 1 else "the ranks of a separate teacher"
        raise ValueError(
            f"{owner}.fp8.recipe='delayed' with {owner}.tensor_model_parallel_size={tp} needs one "
            f"scale for these ranks alone, which Megatron cannot give it beside {others}; take "
            "'tensorwise' or 'blockwise', or tensor_model_parallel_size=1"
        )


def keeps_own_scales(layout: Layout) -> bool:
    """Whether other ranks of the world run other layers than a rank of ``layout``, or none."""
    beside = dist.is_initialized() and dist.get_world_size() > layout.world_size
    return layout.pp > 1 or beside


def saved_activation_bytes(model: ModelConfig, shape: DecoderShape, layers: Sequence[int]) -> int:
    """Bytes that FP8 keeps fewer for the backward, a packed token and rank, on the pipeline stage
    where that is most: the inputs of a dense layer's four linears in one byte instead of two.

    ``layers``: on each stage. Weights count for nothing, they stay in bf16 (``fp8_param=False``);
    nor do experts' inputs, which depend on the routing, nor scales (4 bytes in 128 or fewer).
    """
    if model.fp8.format == "off" or model.recompute_granularity == "full":
        return 0
    tp = model.tensor_model_parallel_size
    sharded = shape.num_attention_heads * shape.kv_channels
    whole = shape.hidden_size
    if shape.num_experts == 0:
        sharded, whole = sharded + shape.ffn_hidden_size, 2 * whole
    in_fp8 = list(layers)
    if model.fp8.first_last_layers_bf16:
        in_fp8[0] -= 1
        in_fp8[-1] -= 1
    if model.sequence_parallel:
        whole //= tp
    return max(0, *in_fp8) * (whole + sharded // tp)


@contextlib.contextmanager
def allowing_pickled_scales(config: "TransformerConfig") -> Iterator[None]:
    """Transformer Engine pickles the histories of delayed scaling and reads none back unless it is
    told that their file is to be trusted. For a run's own checkpoint, whose sums were verified."""
    if not config.fp8 or config.fp8_recipe != "delayed":
        yield
        return
    before = os.environ.get(_UNPICKLE)
    os.environ[_UNPICKLE] = "1"
    try:
        yield
    finally:
        del os.environ[_UNPICKLE]
        if before is not None:
            os.environ[_UNPICKLE] = before


def drop_weight_copies(module: nn.Module) -> None:
    """Gives back the FP8 copies of weights that Transformer Engine keeps from a step's first
    microbatch on: it makes those it does not find anew."""
    for part in module.modules():
        copies = getattr(part, "_fp8_workspaces", None)
        if isinstance(copies, dict):
            copies.clear()


def refuse_machine(fp8: Fp8Config, owner: str) -> None:
    if not torch.cuda.is_available():
        raise ValueError(
            f"{owner}.fp8.format={fp8.format!r} needs an NVIDIA GPU and this machine has none; set "
            f"{owner}.fp8.format=off"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            f"{owner}.fp8.format={fp8.format!r} needs Transformer Engine; `megatron-prefix "
            "doctor` names the command that installs it"
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
    if fp8.recipe == "blockwise" and _cuda_version() < BLOCKWISE_CUDA:
        raise ValueError(
            f"{owner}.fp8.recipe='blockwise' needs a torch of CUDA 12.9 or newer and this one has "
            f"{torch.version.cuda}; take 'tensorwise' or 'delayed'"
        )


def _cuda_version() -> tuple[int, ...]:
    return tuple(map(int, (torch.version.cuda or "0").split(".")))
