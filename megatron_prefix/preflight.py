"""What only the machine that trains can answer: its GPUs, its Transformer Engine, its data sets."""

from typing import TYPE_CHECKING

from megatron_prefix.config import ModelConfig, Recipe
from megatron_prefix.modes import needs_prompts, needs_written, section_of, teachers_of
from megatron_prefix.validate import ValidRun

if TYPE_CHECKING:
    from megatron_prefix.data.prompts import PromptStream


def check_machine(run: ValidRun) -> None:
    """ValueError where this machine cannot run what ``validate`` found sound."""
    import torch

    from megatron_prefix.mcore.fp8 import refuse_machine

    recipe = run.recipe
    teachers = {section_of(name): model for name, model in teachers_of(recipe).items()}
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for owner, model in {"student": recipe.student, **teachers}.items():
        if model.fp8.format != "off":
            refuse_machine(model.fp8, owner)
        if gpus:
            refuse_fp32_shares(model, owner)
    if recipe.rollout.device == "cuda" and not gpus:
        raise ValueError("rollout.device=cuda and this machine has no NVIDIA GPU; set it to cpu")
    if gpus and run.world_size > gpus:
        raise ValueError(
            f"{run.world_size} ranks need a GPU each and this machine has {gpus}; set "
            f"run.world_size={gpus} or less, with layouts that fit"
        )


def refuse_fp32_shares(model: ModelConfig, owner: str) -> None:
    """ValueError for what no attention of Transformer Engine's can do."""
    ranks = model.context_parallel_size
    if ranks > 1 and model.params_dtype == "fp32":
        raise ValueError(
            f"{owner}.context_parallel_size={ranks} with {owner}.params_dtype=fp32 has no "
            f"attention on a GPU; set {owner}.params_dtype=bf16 or {owner}.context_parallel_size=1"
        )


def check_data_sets(recipe: Recipe) -> None:
    """Opens both data sets, fetching those of the hub; ValueError for one that is missing, broken,
    without the named columns, or without a prompt that fits."""
    if needs_prompts(recipe):
        open_prompts(recipe)
    if needs_written(recipe) and not recipe.rollout.replay:
        from megatron_prefix.data.stop_tokens import agreed_stop_ids
        from megatron_prefix.data.tokenizers import load_tokenizer
        from megatron_prefix.data.written import check_written

        tokenizer = load_tokenizer(recipe.student.hf_path)
        check_written(recipe, tokenizer, agreed_stop_ids(recipe))
    if recipe.eval.path:
        from megatron_prefix.data.tokenizers import load_tokenizer
        from megatron_prefix.evaluation.evaluate import load_eval_set

        load_eval_set(recipe.eval, load_tokenizer(recipe.student.hf_path), recipe.data)


def open_prompts(recipe: Recipe) -> "PromptStream":
    """The prompts to sample from, or, where none is sampled from, those of the written answers;
    ValueError as in :func:`check_data_sets`."""
    from megatron_prefix.data.domains import domain_readers
    from megatron_prefix.data.prompts import PromptStream
    from megatron_prefix.data.teacher_prompts import teacher_readers
    from megatron_prefix.data.tokenizers import load_tokenizer
    from megatron_prefix.data.written import written_data

    data = recipe.data if needs_prompts(recipe) else written_data(recipe)
    tokenizer = load_tokenizer(recipe.student.hf_path)
    readers = (*teacher_readers(recipe, data, tokenizer), *domain_readers(recipe))
    return PromptStream(data, tokenizer, readers=readers)
