"""A model's folder, and whether a layout and a precision fit what is in it. No weight is read."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_prefix.config import ModelConfig, Recipe
from megatron_prefix.hf_folder import check_sizes, check_tensors, read_hf_folder
from megatron_prefix.layout import Layout, layers_by_stage

if TYPE_CHECKING:
    from megatron_prefix.mcore.hf_map import HfModel

ReadModel = Callable[[str, str], "HfModel"]  # of a folder, for an owner


@dataclass(frozen=True)
class ValidModel:
    """A model whose folder and layout fit each other."""

    config: ModelConfig
    hf: "HfModel"
    layout: Layout
    layers: tuple[int, ...]  # on each pipeline stage


def read_model(hf_path: str, owner: str) -> "HfModel":
    """The family, sizes and names of a folder that holds every tensor they ask for, whole.

    ``owner`` is for messages. ValueError as in ``hf_folder.py``, and for a family or a variant of
    one that is not supported.
    """
    # Brings torch along, which a mistyped setting need not wait for.
    from megatron_prefix.mcore.hf_map import FAMILIES, read_hf_model
    from megatron_prefix.mcore.hf_map.units import hf_tensors

    folder = read_hf_folder(hf_path, owner)
    if folder.config["architectures"][0] in FAMILIES:
        check_sizes(folder, owner)
    try:
        hf = read_hf_model(hf_path)
    except ValueError as error:
        raise ValueError(f"{owner}.hf_path={hf_path}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{owner}.hf_path={hf_path}: config.json has no {error}") from error
    check_tensors(folder, hf_tensors(hf.units), owner, hf.skipped)
    hf.report_skipped(folder.tensors)
    return hf


def check_model(hf: "HfModel", model: ModelConfig, owner: str) -> tuple[int, ...]:
    """The layers of each stage; ValueError where the layout or the precision does not fit."""
    _check_tensor_parallel(hf, model, owner)
    _check_context_parallel(hf, model, owner)
    _check_experts(hf, model, owner)
    _check_precision(hf, model, owner)
    return _stages(hf, model, owner)


def _check_tensor_parallel(hf: "HfModel", model: ModelConfig, owner: str) -> None:
    """The vocabulary alone need not divide: each shard is padded, and the loss leaves it out."""
    tp, shape = model.tensor_model_parallel_size, hf.shape
    sizes = {
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_query_groups,
        "intermediate_size": shape.ffn_hidden_size,
    }
    if shape.shared_ffn_hidden_size:
        sizes["n_shared_experts * moe_intermediate_size"] = shape.shared_ffn_hidden_size
    for name, size in sizes.items():
        if size % tp:
            fits = [n for n in range(1, tp) if all(s % n == 0 for s in sizes.values())]
            raise ValueError(
                f"{owner}.tensor_model_parallel_size={tp} does not divide {name}={size} of "
                f"{hf.path}; try {fits[-1]}"
            )
    if model.sequence_parallel and tp == 1:
        raise ValueError(
            f"{owner}.sequence_parallel=true needs {owner}.tensor_model_parallel_size above 1; set "
            "it to false"
        )


def _check_context_parallel(hf: "HfModel", model: ModelConfig, owner: str) -> None:
    ranks = model.context_parallel_size
    if ranks > 1 and hf.settings.get("softmax_type") == "learnable":
        raise ValueError(
            f"{owner}.context_parallel_size={ranks}: {hf.path} has attention sinks and windows, "
            "which are not cut over context-parallel ranks; set it to 1"
        )


def _check_experts(hf: "HfModel", model: ModelConfig, owner: str) -> None:
    shape, tp = hf.shape, model.tensor_model_parallel_size
    ep, etp = model.expert_model_parallel_size, model.expert_tensor_parallel_size
    if not shape.num_experts:
        if ep > 1 or etp:
            name, size = ("model", ep) if ep > 1 else ("tensor", etp)
            raise ValueError(
                f"{owner}.expert_{name}_parallel_size={size}, but {hf.path} has no experts; leave "
                "it out"
            )
        return
    if shape.num_experts % ep:
        fits = [n for n in range(1, ep) if shape.num_experts % n == 0]
        raise ValueError(
            f"{owner}.expert_model_parallel_size={ep} does not divide the {shape.num_experts} "
            f"experts of {hf.path}; try {fits[-1]}"
        )
    if hf.settings.get("add_bias_linear") and (etp or tp) > 1:
        raise ValueError(
            f"{owner}.expert_tensor_parallel_size={etp or tp} would cut the experts of {hf.path}, "
            "which have biases: Megatron-Core cannot; set it to 1"
        )
    if shape.moe_ffn_hidden_size % (etp or tp):
        raise ValueError(
            f"{owner}.expert_tensor_parallel_size={etp or tp} does not divide an expert's width "
            f"{shape.moe_ffn_hidden_size} of {hf.path}; try 1"
        )
    if tp > 1 and not model.sequence_parallel:
        raise ValueError(
            f"{owner}.tensor_model_parallel_size={tp} with experts needs sequence parallelism, or "
            f"each rank would send the same tokens; set {owner}.sequence_parallel=true"
        )


def _stages(hf: "HfModel", model: ModelConfig, owner: str) -> tuple[int, ...]:
    layers, pp = hf.shape.num_layers, model.pipeline_model_parallel_size
    first = model.num_layers_in_first_pipeline_stage
    if pp > layers:
        raise ValueError(
            f"{owner}.pipeline_model_parallel_size={pp} is more than the {layers} layers of "
            f"{hf.path}; try {layers}"
        )
    if first and pp == 1:
        raise ValueError(
            f"{owner}.num_layers_in_first_pipeline_stage={first} needs "
            f"{owner}.pipeline_model_parallel_size above 1; set it to 0"
        )
    try:
        return layers_by_stage(layers, pp, first)
    except ValueError as error:
        raise ValueError(f"{owner}.{error}") from error


def _check_precision(hf: "HfModel", model: ModelConfig, owner: str) -> None:
    from megatron_prefix.mcore.fp8 import refuse_names

    if model.fp8.format == "off":
        return
    refuse_names(model.fp8, owner)
    if model.params_dtype != "bf16":
        raise ValueError(
            f"{owner}.fp8.format={model.fp8.format} needs {owner}.params_dtype=bf16, not "
            f"{model.params_dtype}"
        )
    tp, shape = model.tensor_model_parallel_size, hf.shape
    widths = {
        "hidden_size": shape.hidden_size,
        "intermediate_size / tensor parallel": shape.ffn_hidden_size // tp,
        "query width / tensor parallel": shape.num_attention_heads * shape.kv_channels // tp,
    }
    for name, width in widths.items():
        if model.fp8.recipe == "blockwise" and width % 128:
            raise ValueError(
                f"{owner}.fp8.recipe=blockwise works on blocks of 128 and {name} is {width} in "
                f"{hf.path}; take {owner}.fp8.recipe=tensorwise"
            )


def check_context(recipe: Recipe, hf: "HfModel", owner: str) -> None:
    """ValueError where the longest prompt and answer are more than the model's positions."""
    context, prompt = hf.shape.max_position_embeddings, recipe.data.max_prompt_length
    longest = "data.max_prompt_length"
    if owner == "teacher" and recipe.mode.teacher_prompt.max_length:
        longest, prompt = "mode.teacher_prompt.max_length", recipe.mode.teacher_prompt.max_length
    answers = {"prefix.max_length": recipe.prefix.max_length}
    if owner == "student" and recipe.eval.path:
        answers["eval.max_new_tokens"] = recipe.eval.max_new_tokens
    for key, length in answers.items():
        if prompt + length > context:
            raise ValueError(
                f"{longest}={prompt} + {key}={length} is above "
                f"max_position_embeddings={context} of {owner}.hf_path={hf.path}; shorten one"
            )
