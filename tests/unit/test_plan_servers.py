"""What ``plan`` says of a teacher's servers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prefix.config import DataConfig, ModelConfig, PrefixConfig, Recipe
from megatron_prefix.config.teacher import TeacherServerConfig
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.jobs.cluster import Cluster
from megatron_prefix.mcore.hf_map import served_model
from megatron_prefix.plan import Plan, plan_recipe, refuse_what_does_not_fit
from megatron_prefix.plan.fit import GIB, free_for_servers
from megatron_prefix.plan.servers import (
    TeacherServers,
    refuse_servers,
    servers_lines,
    weight_bytes,
)
from megatron_prefix.recipe import load_recipe
from tests.tiny_models import write_tiny_deepseek_v3, write_tiny_llama

BIG = "qwen3_32b_to_qwen3_8b_8xh100_bf16"
SERVED = (
    "teacher.placement=server",
    "teacher.tensor_model_parallel_size=1",
    "teacher.sequence_parallel=false",
    "rollout.server_args=[--mem-fraction-static,0.1]",
)


def planned(*settings: str) -> Plan:
    return plan_recipe(load_recipe(BIG, "", [*SERVED, *settings]), Cluster(), quick=True)


def only(plan: Plan) -> TeacherServers:
    (servers,) = plan.teacher_servers
    return servers


def test_a_started_server_has_its_share_on_each_gpu() -> None:
    plan = planned("teacher.server.tensor_parallel_size=2", "teacher.server.max_total_tokens=1000")
    servers = only(plan)
    # Qwen3-32B: 64 layers, 8 key-value heads of 128, in bf16.
    assert servers.cache == 1000 * 2 * 64 * 8 * 128 * 2
    assert servers.weights == 2 * plan.teacher.parameters
    assert servers.a_gpu(2) * 2 == servers.weights + servers.cache
    assert servers.a_gpu(16) == servers.weights // 16 + servers.cache // 8, "8 heads, on 16 GPUs"
    (line,) = servers_lines(plan.teacher_servers, free_for_servers(plan.recipe))
    assert "teacher.server, an estimate: each of 1 servers has 61.0 GiB of weights" in line
    assert "30.6 GiB on each of its 2 GPUs" in line


def test_without_a_bound_the_cache_is_of_a_whole_step() -> None:
    plan = planned()
    recipe = plan.recipe
    longest = recipe.data.max_prompt_length + recipe.prefix.max_length
    assert only(plan).cache_tokens == recipe.train.global_batch_size * longest


def test_running_servers_are_told_how_many_gpus_they_need() -> None:
    plan = planned("teacher.server.urls=[http://a:1,http://b:1]", "run.gpu_memory_gib=40")
    (line,) = servers_lines(plan.teacher_servers, free_for_servers(plan.recipe))
    assert "each of 2 servers" in line
    assert "4 GPUs of 34.0 GiB or more, 1 nodes of 8" in line
    refuse_servers(plan.teacher_servers, GIB)


def test_weights_that_no_gpu_holds_are_refused_with_a_remedy() -> None:
    recipe = load_recipe(BIG, "", [*SERVED, "run.gpu_memory_gib=60"])
    remedy = r"61.0 GiB of weights on each of its 1 GPUs.*teacher.server.tensor_parallel_size=4,"
    with pytest.raises(ValueError, match=remedy):
        refuse_what_does_not_fit(recipe)
    unchecked = replace(recipe, run=replace(recipe.run, check_memory=False))
    refuse_what_does_not_fit(unchecked)


def planned_here(folder: Path) -> Plan:
    write_byte_tokenizer(folder)
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "x", "answer": "y"}))
    teacher = ModelConfig(
        hf_path=str(folder), placement="server", server=TeacherServerConfig(top_k=4)
    )
    recipe = Recipe(
        student=ModelConfig(hf_path=str(folder)),
        teacher=teacher,
        data=DataConfig(path=str(prompts), max_prompt_length=64, chat_template="never"),
        prefix=PrefixConfig("fixed", 8, 8),
    )
    return plan_recipe(recipe, Cluster(), quick=True)


def test_a_folders_tensors_count_as_a_server_holds_them(tmp_path: Path) -> None:
    folder = write_tiny_llama(tmp_path / "teacher", vocab_size=265)
    tensors = load_file(folder / "model.safetensors")
    values = sum(tensor.numel() for tensor in tensors.values())
    assert only(planned_here(folder)).weights == 2 * values, "fp32 there, bf16 on the server"
    narrow = torch.zeros(1000, dtype=torch.float8_e4m3fn)
    save_file({"some.quantised": narrow}, folder / "more.safetensors", {"format": "pt"})
    assert teacher_weights(folder) == 2 * values + 1000


def teacher_weights(folder: Path) -> int:
    return weight_bytes(
        served_model(str(folder), json.loads((folder / "config.json").read_text())), 2
    )


def test_a_latent_cache_is_whole_on_every_gpu(tmp_path: Path) -> None:
    servers = only(planned_here(write_tiny_deepseek_v3(tmp_path / "teacher", vocab_size=265)))
    assert servers.cache == servers.cache_tokens * 2 * (32 + 8) * 2  # two layers, latent and rope
    assert servers.a_gpu(4) - servers.cache == -(-servers.weights // 4)
