"""A student of random weights on a real server, family by family: it answers as transformers does,
takes weights through the group in the smallest buckets, and the checksums prove it.

DeepSeek-V3 stands for the others: latent attention, a dense layer, stacked and shared experts whose
width the server pads, and a router's bias that stays in fp32. Qwen3's students are everywhere else.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_prefix.config import RolloutConfig
from megatron_prefix.mcore.cpu import adapt_to_cpu
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.rollout.checksum import WeightHasher, WeightsDiffer, verify
from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.protocol import Sampling
from megatron_prefix.rollout.server import server_pool
from megatron_prefix.rollout.weights import WeightGroup
from tests.tiny_models import (
    as_published,
    write_tiny_deepseek_v2,
    write_tiny_deepseek_v3,
    write_tiny_llama,
    write_tiny_mixtral,
    write_tiny_qwen2,
    write_tiny_qwen3_moe,
)

adapt_to_cpu()

from megatron_prefix.publisher import served_layout  # noqa: E402

PROMPT = [5, 6, 7, 9, 20, 31]
TOKENS = 12
Weights = dict[str, torch.Tensor]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LIMITED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
FAMILIES = {
    "deepseek-v3": (write_tiny_deepseek_v3, {}),
    "deepseek-v2": (write_tiny_deepseek_v2, LIMITED | {"q_lora_rank": None}),
    "mixtral": (write_tiny_mixtral, {}),
    "qwen3-moe": (write_tiny_qwen3_moe, {}),
    "llama": (write_tiny_llama, {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
    "qwen2": (write_tiny_qwen2, {}),
}
DEFAULT, *OTHERS = FAMILIES


def written(family: str, folder: Path, seed: int) -> Path:
    write, overrides = FAMILIES[family]
    write(folder, seed=seed, **({"vocab_size": 100} | overrides))
    return as_published(folder) if "deepseek" in family else folder


def greedy(folder: Path) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False)
    return ids[0, len(PROMPT) :].tolist()


def hashes(client: SglangClient, folder: Path, weights: Weights) -> dict[int, dict[str, str]]:
    layout = served_layout(read_hf_model(str(folder)), torch.float32, client.server_info())
    hasher = WeightHasher(layout)
    for name, tensor in weights.items():
        hasher.add(name, tensor)
    return hasher.checksums()


def smallest_buckets(folder: Path, weights: Weights) -> list[list[tuple[str, torch.Tensor]]]:
    """One unit each, and what the trainer never takes apart."""
    buckets: list[list[tuple[str, torch.Tensor]]] = []
    for unit in read_hf_model(str(folder)).units:
        if not unit.with_previous:
            buckets.append([])
        buckets[-1] += [(name, weights[name]) for name in unit.hf_names]
    return buckets


def answer(client: SglangClient) -> list[int]:
    return list(client.generate([PROMPT], Sampling(TOKENS, temperature=0.0))[0].token_ids)


@pytest.mark.parametrize(
    "family", [DEFAULT, *(pytest.param(name, marks=pytest.mark.on_request) for name in OTHERS)]
)
def test_a_student_is_served_synced_and_proved(family: str, tmp_path: Path) -> None:
    first, second = (written(family, tmp_path / str(seed), seed) for seed in (0, 1))
    weights = load_file(second / "model.safetensors")
    rollout = RolloutConfig(device="cpu")
    with (
        server_pool(first, rollout, params_dtype="fp32", log_folder=tmp_path) as servers,
        SglangClient(servers[0].endpoint) as client,
    ):
        verify(client, hashes(client, first, load_file(first / "model.safetensors")))
        assert answer(client) == greedy(first)
        group = WeightGroup.join([client], backend="gloo", timeout_s=60.0)
        group.publish(smallest_buckets(second, weights), 1)
        group.close()
        verify(client, hashes(client, second, weights))
        assert answer(client) == greedy(second) != greedy(first)
        name = next((name for name in weights if "correction_bias" in name), "model.norm.weight")
        weights[name][0] += 1e-6  # less than bf16 tells apart
        with pytest.raises(WeightsDiffer, match=f"hold the published weights: {name}") as caught:
            verify(client, hashes(client, second, weights))
        assert str(caught.value).count("(trainer") == 1
