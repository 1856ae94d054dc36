"""The SORT-CHAIN teacher's own answers, for the policies that learn from written ones."""

import json
import os
from itertools import islice
from pathlib import Path

from megatron_prefix.config import Recipe
from megatron_prefix.data.tokenizers import load_tokenizer, stop_token_ids
from megatron_prefix.prefix import model_shape
from megatron_prefix.prefix.flops import rollout_flops
from megatron_prefix.rollout.collector import Collector
from megatron_prefix.rollout.server import server_pool
from megatron_prefix.run_files.jsonl import read_records
from megatron_prefix.tasks import sort_chain
from megatron_prefix.types import Prompt


def answers_file(cache: Path, count: int) -> Path:
    return cache / "data" / f"teacher_{count}.jsonl"


def write_answers(recipe: Recipe, cache: Path, count: int) -> None:
    """Samples the teacher once on each of the first ``count`` training prompts, at temperature 1
    and to full length; nothing where that was done."""
    target = answers_file(cache, count)
    if target.is_file():
        return
    rows = list(islice(read_records(sort_chain.data_files(cache / "data").train), count))
    tokenizer = load_tokenizer(recipe.teacher.hf_path)
    prompts = [
        Prompt(i, i, tuple(tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]))
        for i, row in enumerate(rows)
    ]
    stops = stop_token_ids(recipe.teacher.hf_path)
    with (
        server_pool(
            recipe.teacher.hf_path,
            recipe.rollout,
            params_dtype=recipe.teacher.params_dtype,
            log_folder=cache / "logs",
        ) as servers,
        Collector([server.endpoint for server in servers], recipe.rollout, stops) as collector,
    ):
        length = sort_chain.RESPONSE_LENGTH
        written = collector.collect(prompts, max_new_tokens=length, policy_version=0)
    fresh = target.with_suffix(".new")
    lines = [
        json.dumps({"prompt": row["prompt"], "answer": list(rollout.prefix_ids)})
        for row, rollout in zip(rows, written, strict=True)
    ]
    fresh.write_text("\n".join(lines) + "\n")
    os.replace(fresh, target)


def writing_flops(count: int) -> float:
    """What sampling ``count`` answers from the teacher costs."""
    folder = sort_chain.model_folder("teacher")
    shape = model_shape(json.loads(Path(folder, "config.json").read_text()))
    lengths = sort_chain.PROMPT_LENGTH, sort_chain.RESPONSE_LENGTH
    return count * rollout_flops(shape, shape, *lengths).rollout
