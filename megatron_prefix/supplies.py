"""Puts together what rollouts come from: prompts, servers, written answers, a recording."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prefix.config import DataConfig, Recipe
from megatron_prefix.data.domains import domain_readers
from megatron_prefix.data.prompts import PromptStream
from megatron_prefix.data.sources import (
    ModeSource,
    RecordedSource,
    ReplaySource,
    RolloutSource,
    ServerSource,
    Supply,
)
from megatron_prefix.data.teacher_prompts import teacher_readers
from megatron_prefix.data.written import WrittenSource
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.modes import needs_rollouts, needs_written
from megatron_prefix.prefix import build_cut_off
from megatron_prefix.prefix.recall import Recall
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.collector import Collector
from megatron_prefix.rollout.discarded import Discarded
from megatron_prefix.rollout.fleet import Fleet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_source(
    recipe: Recipe,
    folder: Path,
    endpoints: Sequence[Endpoint],
    stops: tuple[int, ...],
    tokenizer: "PreTrainedTokenizerBase",
    recall: Recall | None,
    stack: contextlib.ExitStack,
    fleet: Fleet | None,
    discarded: Discarded,
) -> RolloutSource:
    """What the recipe's mode takes each step's rollouts from; ``stack`` closes what it opens, and
    ``discarded`` hears of what is sampled and thrown away."""
    if recipe.rollout.replay:
        return ReplaySource(Path(recipe.rollout.replay), discarded)
    supplies: dict[str, Supply] = {}
    if needs_rollouts(recipe):
        vocab_size = read_hf_model(recipe.student.hf_path).shape.vocab_size
        cut_off = build_cut_off(recipe.prefix.cut_off, vocab_size)
        collector = stack.enter_context(
            Collector(endpoints, recipe.rollout, stops, cut_off, fleet, discarded)
        )
        prompts = prompt_stream(recipe, recipe.data, tokenizer)
        supplies["sampled"] = ServerSource(recipe, prompts, collector, recall)
    if needs_written(recipe):
        supplies["written"] = WrittenSource(recipe, tokenizer, stops)
    source = ModeSource(recipe, supplies)
    if recipe.rollout.record:
        return RecordedSource(source, folder / "rollouts", discarded)
    return source


def prompt_stream(
    recipe: Recipe, data: DataConfig, tokenizer: "PreTrainedTokenizerBase"
) -> PromptStream:
    """The prompts of ``data``, with the teacher's own where it reads others."""
    readers = (*teacher_readers(recipe, data, tokenizer), *domain_readers(recipe))
    return PromptStream(data, tokenizer, readers=readers)
