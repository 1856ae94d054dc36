"""A DeepSeek-V3 of random weights on a real server: it answers as transformers does, takes weights
through the group, and the checksums prove it. Latent attention, a dense layer, stacked and shared
experts whose width the server pads, and a router's bias that stays in fp32 are all in it."""

import json
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
from tests.tiny_models import write_tiny_deepseek_v3

adapt_to_cpu()

from megatron_prefix.publisher import served_layout  # noqa: E402

PROMPT = [5, 6, 7, 9, 20, 31]
TOKENS = 12
Weights = dict[str, torch.Tensor]
# Published configs say what transformers leaves out of what it writes, and SGLang asks for.
PUBLISHED = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def written(folder: Path, seed: int) -> Path:
    write_tiny_deepseek_v3(folder, seed=seed, vocab_size=100, max_position_embeddings=512)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | PUBLISHED))
    return folder


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


def test_a_latent_student_is_served_synced_and_proved(tmp_path: Path) -> None:
    first, second = written(tmp_path / "first", 0), written(tmp_path / "second", 1)
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
        weights[BIAS][0] += 1e-6  # less than bf16 tells apart
        with pytest.raises(WeightsDiffer, match=f"hold the published weights: {BIAS}") as caught:
            verify(client, hashes(client, second, weights))
        assert str(caught.value).count("(trainer") == 1
