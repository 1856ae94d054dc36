"""Whatever can be refused is refused here, in one line, before any server or rank starts.

No GPU is needed, no weight is read and nothing is fetched: ``plan`` stands on it alone.
``preflight.py`` asks what only the machine that trains can answer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prefix.config import ModelConfig, Recipe
from megatron_prefix.hf_folder import check_sizes, check_tensors, read_hf_folder
from megatron_prefix.layout import Layout, layers_by_stage
from megatron_prefix.limits import check_settings
from megatron_prefix.placement import (
    check_placement,
    nearest_multiples,
    resolve_world_size,
    section_of,
    teachers_of,
    world_layout,
)
from megatron_prefix.prefix_checks import check_prefix
from megatron_prefix.served import check_served, check_servers, check_top_k, read_served
from megatron_prefix.validate_data import check_data

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


@dataclass(frozen=True)
class ValidRun:
    """A recipe that nothing was found to be wrong with."""

    recipe: Recipe
    world_size: int
    student: ValidModel
    teacher: ValidModel
    more_teachers: dict[str, ValidModel] = field(default_factory=dict)  # by domain


def validate(
    recipe: Recipe, read: ReadModel | None = None, *, sizes_only: bool = False
) -> ValidRun:
    """Checks every setting alone and against the others, then the model folders.

    ValueError names the first that cannot be, with its value and what to set instead. ``read``
    stands in for :func:`read_model`; ``sizes_only``: tokenizers are not looked at.
    """
    check_settings(recipe)
    check_prefix(recipe)
    _check_run(recipe)
    check_placement(recipe)
    check_served(recipe)
    _check_schedule(recipe)
    _check_rollout(recipe)
    check_data(recipe)
    world_size = resolve_world_size(recipe)
    world = world_layout(recipe, world_size)
    read = read or read_model
    student = _validate_model(recipe, "student", recipe.student, world.student, read)
    teachers = {
        domain: _validate_model(recipe, section_of(domain), teacher, world.teachers[domain], read)
        for domain, teacher in teachers_of(recipe).items()
    }
    for domain, teacher in teachers.items():
        if world.served(domain):
            vocabulary = min(student.hf.shape.vocab_size, teacher.hf.shape.vocab_size)
            check_top_k(teacher.config, vocabulary, section_of(domain))
        _check_batch(recipe, student.layout, teacher.layout, section_of(domain))
        if not sizes_only:
            _check_tokenizers(recipe, student.hf, teacher, section_of(domain))
    if not sizes_only:
        _check_first_weights(recipe, student.hf)
    return ValidRun(recipe, world_size, student, teachers.pop(""), teachers)


def _check_first_weights(recipe: Recipe, student: "HfModel") -> None:
    if recipe.checkpoint.load:
        from megatron_prefix.mcore.steps import check_saved_weights

        check_saved_weights(student, recipe.checkpoint.load)


def _check_run(recipe: Recipe) -> None:
    name = recipe.run.name
    if not name or name in (".", "..") or name != Path(name).name:
        raise ValueError(f"run.name={name!r} must be the name of one folder, like my-run")
    if not recipe.run.output_dir:
        raise ValueError("run.output_dir is empty; try run.output_dir=runs")


def _check_schedule(recipe: Recipe) -> None:
    optimizer, steps = recipe.optimizer, recipe.train.steps
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(
            f"optimizer.min_lr={optimizer.min_lr} is above optimizer.lr={optimizer.lr}; set it to "
            f"{optimizer.lr / 10:g}"
        )
    if optimizer.lr_warmup_steps >= steps:
        raise ValueError(
            f"optimizer.lr_warmup_steps={optimizer.lr_warmup_steps} must be less than "
            f"train.steps={steps}; try {steps // 10}"
        )


def _check_rollout(recipe: Recipe) -> None:
    rollout = recipe.rollout
    check_servers(rollout, ("rollout.server_urls", "rollout.server_args", "rollout.api_key_file"))
    if rollout.replay:
        folder = Path(rollout.replay)
        if not folder.is_dir() or not any(folder.iterdir()):
            raise ValueError(
                f"rollout.replay={rollout.replay} is no folder of recorded rollouts; record one "
                "with rollout.record=true"
            )
    batch, samples = recipe.train.global_batch_size, rollout.samples_per_prompt
    if batch % samples:
        raise ValueError(
            f"train.global_batch_size={batch} must be a multiple of rollout.samples_per_prompt="
            f"{samples}; try {nearest_multiples(batch, samples)}"
        )


def _check_batch(recipe: Recipe, student: Layout, teacher: Layout, section: str) -> None:
    """Every replica takes equally many microbatches; the teacher scores the student's."""
    batch, micro = recipe.train.global_batch_size, recipe.train.micro_batch_size
    layouts = {"student": student, section: teacher}
    # Of several, each takes a step's microbatches as they come; servers take any.
    if recipe.teachers or not teacher.dp:
        del layouts[section]
    least = math.lcm(
        recipe.rollout.samples_per_prompt, *(micro * layout.dp for layout in layouts.values())
    )
    for owner, layout in layouts.items():
        if batch % (micro * layout.dp):
            raise ValueError(
                f"train.global_batch_size={batch} must be a multiple of train.micro_batch_size="
                f"{micro} * {owner}'s data parallel={layout.dp}; try "
                f"{nearest_multiples(batch, least)}"
            )


def _validate_model(
    recipe: Recipe, owner: str, model: ModelConfig, layout: Layout, read: ReadModel
) -> ValidModel:
    from megatron_prefix.mcore.fp8 import refuse_delayed

    served = model.placement == "server"
    here = served and Path(model.hf_path).is_dir()  # else by the shapes of a published model
    hf = read_served(model.hf_path, owner) if here else read(model.hf_path, owner)
    layers = () if served else check_model(hf, model, owner)
    if not served:
        beside = any(teacher.placement == "separate" for teacher in teachers_of(recipe).values())
        refuse_delayed(model, owner, beside=beside)
    _check_context(recipe, hf, owner)
    return ValidModel(model, hf, layout, layers)


def check_model(hf: "HfModel", model: ModelConfig, owner: str) -> tuple[int, ...]:
    """The layers of each stage; ValueError where the layout or the precision does not fit."""
    _check_tensor_parallel(hf, model, owner)
    _check_experts(hf, model, owner)
    _check_precision(hf, model, owner)
    return _stages(hf, model, owner)


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


def _check_context(recipe: Recipe, hf: "HfModel", owner: str) -> None:
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


def _check_tokenizers(
    recipe: Recipe, student: "HfModel", teacher: ValidModel, section: str
) -> None:
    from megatron_prefix.stop_tokens import check_stop_tokens
    from megatron_prefix.tokenizers import check_same_tokenizer, load_tokenizer

    path = recipe.student.hf_path
    check_same_tokenizer(path, teacher.config.hf_path, section)
    check_stop_tokens(replace(recipe, teacher=teacher.config))
    largest = max(load_tokenizer(path).get_vocab().values())
    smallest = min(student.shape.vocab_size, teacher.hf.shape.vocab_size)
    if largest >= smallest:
        raise ValueError(
            f"the tokenizer of student.hf_path={path} has id {largest} and the "
            f"smaller vocabulary has {smallest} rows; give checkpoints that know every token"
        )
