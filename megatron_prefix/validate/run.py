"""The checks of a whole recipe, in their order: settings, then the model folders."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prefix.config import ModelConfig, Recipe
from megatron_prefix.layout import Layout
from megatron_prefix.modes import section_of, teachers_of
from megatron_prefix.placement import (
    check_placement,
    nearest_multiples,
    resolve_world_size,
    world_layout,
)
from megatron_prefix.rollout.records import recorded_steps
from megatron_prefix.teachers.served import check_served, check_servers, check_top_k, read_served
from megatron_prefix.validate.data import check_data
from megatron_prefix.validate.limits import check_settings
from megatron_prefix.validate.model import (
    ReadModel,
    ValidModel,
    check_context,
    check_model,
    read_model,
)
from megatron_prefix.validate.modes import check_modes
from megatron_prefix.validate.prefix import check_overlap_k, check_prefix

if TYPE_CHECKING:
    from megatron_prefix.mcore.hf_map import HfModel


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
    check_modes(recipe)
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
        vocabulary = min(student.hf.shape.vocab_size, teacher.hf.shape.vocab_size)
        check_overlap_k(recipe.prefix, vocabulary)
        if world.served(domain):
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
    if rollout.replay and not recorded_steps(rollout.replay):
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
    check_context(recipe, hf, owner)
    return ValidModel(model, hf, layout, layers)


def _check_tokenizers(
    recipe: Recipe, student: "HfModel", teacher: ValidModel, section: str
) -> None:
    from megatron_prefix.data.stop_tokens import check_stop_tokens
    from megatron_prefix.data.tokenizers import check_same_tokenizer, load_tokenizer

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
