"""SGLang's hashes and the layouts that it hashes, against its own code and dense tensors."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_prefix.rollout import hashing
from megatron_prefix.rollout.checksum import ServedLayout, WeightHasher, is_compared
from megatron_prefix.rollout.hashing import MixedWordHash, Sha256Hash, TensorHash

MIXED = [MixedWordHash, Sha256Hash]


def digest(make: Callable[[], TensorHash], *tensors: torch.Tensor) -> str:
    hash = make()
    for tensor in tensors:
        hash.update(tensor)
    return hash.hexdigest()


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


# Bytes: nothing, less than a word, words, a tile of 8192 words and one to either side, tiles.
SIZES = [0, 1, 4, 6, 4000, 32764, 32768, 32769, 32772, 98_305]

# SGLang's kernels, run by Triton's interpreter where there is no GPU.
SGLANG_HASHES = """
import importlib.util, json, sys, torch, triton
spec = importlib.util.spec_from_file_location("gpu_tensor_hash", sys.argv[2])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

def hashed(tensor):
    data = tensor.view(-1).view(torch.uint8)
    data = torch.cat([data, data.new_zeros(-data.numel() % 4)])
    words = data.view(torch.int32)
    if not words.numel():
        return 0
    partials = torch.empty(triton.cdiv(words.numel(), 8192), dtype=torch.int64)
    seed = 0x243F6A88
    module.hash_tiles32_kernel_blocked[(partials.numel(),)](
        words, partials, words.numel(), seed1=seed,
        seed2=((seed * 0x9E3779B1) ^ 0xDEADBEEF) & 0xFFFFFFFF,
        FM_C1=module.FMIX32_C1, FM_C2=module.FMIX32_C2, POS_A=module.POS_C1, POS_B=module.POS_C2,
        TILE=8192, BLOCK=256, USE_CG=False)
    return module._final_splitmix64(sum(partials.tolist()) % 2**64)

generator = [torch.Generator().manual_seed(0) for _ in json.loads(sys.argv[1])]
print(json.dumps([
    f"{hashed(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=g)):016x}"
    for size, g in zip(json.loads(sys.argv[1]), generator)
]))
"""


def test_the_hash_of_a_gpu_server_is_its_kernels() -> None:
    sglang = importlib.util.find_spec("sglang")
    assert sglang is not None
    assert sglang.origin is not None
    kernels = Path(sglang.origin).parent / "kernels" / "ops" / "memory" / "gpu_tensor_hash.py"
    command = [sys.executable, "-c", SGLANG_HASHES, json.dumps(SIZES), str(kernels)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    expected = json.loads(answer.stdout.splitlines()[-1])
    assert [digest(MixedWordHash, random_bytes(size)) for size in SIZES] == expected


@pytest.mark.parametrize("make", MIXED)
@pytest.mark.parametrize("size", [1, 4000, 32772, 300_001])
def test_pieces_hash_as_the_whole(make: Callable[[], TensorHash], size: int) -> None:
    whole = random_bytes(size)
    for cut in (0, 1, size // 3, size):
        assert digest(make, whole[:cut], whole[cut:]) == digest(make, whole)


def test_long_tensors_are_mixed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = random_bytes(300_000)
    expected = digest(MixedWordHash, whole)
    monkeypatch.setattr(hashing, "_CHUNK_WORDS", 3 * 8192)
    assert digest(MixedWordHash, whole) == expected


@pytest.mark.parametrize("make", MIXED)
def test_a_bit_and_an_order_change_the_hash(make: Callable[[], TensorHash]) -> None:
    whole = random_bytes(70_000)
    flipped = whole.clone()
    flipped[60_001] ^= 1
    assert len({digest(make, each) for each in (whole, flipped, whole.flip(0))}) == 3


def expected_hash(tensor: torch.Tensor) -> str:
    return digest(Sha256Hash, tensor)


def test_fused_tensors_are_whole_whatever_order_they_come_in() -> None:
    q, k, v, gate, up = (torch.randn(rows, 8) for rows in (16, 4, 4, 32, 32))
    hasher = WeightHasher(ServedLayout("cpu", torch.bfloat16))
    for name, tensor in {
        "mlp.up_proj": up,
        "self_attn.v_proj": v,
        "self_attn.q_proj": q,
        "mlp.gate_proj": gate,
        "self_attn.k_proj": k,
    }.items():
        hasher.add(f"model.layers.3.{name}.weight", tensor)
    assert hasher.checksums() == {
        0: {
            "model.layers.3.self_attn.qkv_proj.weight": expected_hash(
                torch.cat([q, k, v]).bfloat16()
            ),
            "model.layers.3.mlp.gate_up_proj.weight": expected_hash(
                torch.cat([gate, up]).bfloat16()
            ),
        }
    }


def test_experts_are_stacked_with_gate_over_up() -> None:
    experts = 3
    gate, up = torch.randn(2, experts, 32, 8)
    down = torch.randn(experts, 8, 32)
    hasher = WeightHasher(ServedLayout("cpu", torch.float32, num_experts=experts))
    names = ("gate_proj", "up_proj", "down_proj")
    for expert in (2, 0, 1):
        for name, tensors in zip(names, (gate, up, down), strict=True):
            hasher.add(f"model.layers.0.mlp.experts.{expert}.{name}.weight", tensors[expert])
    layer = "model.layers.0.mlp.experts"
    assert hasher.checksums()[0] == {
        f"{layer}.w13_weight": expected_hash(torch.cat([gate, up], 1)),
        f"{layer}.w2_weight": expected_hash(down),
    }


def test_a_fused_tensor_that_lacks_a_part_is_named() -> None:
    hasher = WeightHasher(ServedLayout("cpu", torch.float32))
    hasher.add("model.layers.0.self_attn.q_proj.weight", torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.qkv_proj.weight: 1 of its 3 parts"):
        hasher.checksums()


def test_a_vocabulary_is_padded_to_a_multiple_of_64() -> None:
    embedding = torch.randn(70, 4)
    hasher = WeightHasher(ServedLayout("cpu", torch.float32))
    hasher.add("model.embed_tokens.weight", embedding)
    padded = torch.cat([embedding, torch.zeros(58, 4)])
    assert hasher.checksums()[0]["model.embed_tokens.weight"] == expected_hash(padded)


def test_shards_of_tensor_parallel_servers() -> None:
    """Two key-value heads on four ranks: neighbours hold the same one."""
    q, kv, o = torch.randn(16, 8), torch.randn(2, 4, 8), torch.randn(8, 16)
    embedding, norm = torch.randn(128, 8), torch.randn(8)
    hasher = WeightHasher(
        ServedLayout("cpu", torch.float32, tensor_model_parallel_size=4, num_key_value_heads=2)
    )
    layer = "model.layers.0"
    hasher.add(f"{layer}.self_attn.q_proj.weight", q)
    hasher.add(f"{layer}.self_attn.k_proj.weight", kv.view(8, 8))
    hasher.add(f"{layer}.self_attn.v_proj.weight", -kv.view(8, 8))
    hasher.add(f"{layer}.self_attn.o_proj.weight", o)
    hasher.add("model.embed_tokens.weight", embedding)
    hasher.add("model.norm.weight", norm)
    for rank, checksums in hasher.checksums().items():
        head = kv[rank // 2]
        qkv = torch.cat([q[4 * rank : 4 * rank + 4], head, -head])
        assert checksums == {
            f"{layer}.self_attn.qkv_proj.weight": expected_hash(qkv),
            f"{layer}.self_attn.o_proj.weight": expected_hash(o[:, 4 * rank : 4 * rank + 4]),
            "model.embed_tokens.weight": expected_hash(embedding[32 * rank : 32 * rank + 32]),
            "model.norm.weight": expected_hash(norm),
        }
    assert sorted(hasher.checksums()) == [0, 1, 2, 3]


def test_latent_attention_is_named_as_sglang_fuses_it() -> None:
    """With a latent for queries both down-projections are one; without, each keeps its name."""
    layer = "model.layers.0.self_attn"
    query, key_value, up = torch.randn(6, 8), torch.randn(5, 8), torch.randn(16, 4)
    with_latent = ServedLayout("cpu", torch.bfloat16, latent_attention=True, query_latent=True)
    hasher = WeightHasher(with_latent)
    hasher.add(f"{layer}.kv_a_proj_with_mqa.weight", key_value)
    hasher.add(f"{layer}.q_a_proj.weight", query)
    hasher.add(f"{layer}.kv_b_proj.weight", up)
    assert hasher.checksums()[0] == {
        f"{layer}.fused_qkv_a_proj_with_mqa.weight": expected_hash(
            torch.cat([query, key_value]).bfloat16()
        ),
        f"{layer}.kv_b_proj.weight": expected_hash(up.bfloat16()),
    }
    hasher = WeightHasher(ServedLayout("cpu", torch.bfloat16, latent_attention=True))
    hasher.add(f"{layer}.kv_a_proj_with_mqa.weight", key_value)
    hasher.add(f"{layer}.q_proj.weight", query)
    assert hasher.checksums()[0] == {
        f"{layer}.kv_a_proj_with_mqa.weight": expected_hash(key_value.bfloat16()),
        f"{layer}.q_proj.weight": expected_hash(query.bfloat16()),
    }


def test_a_routers_bias_and_shared_experts_of_deepseek() -> None:
    layer = "model.layers.1.mlp"
    gate, up, bias = torch.randn(32, 8), torch.randn(32, 8), torch.randn(4)
    hasher = WeightHasher(ServedLayout("cpu", torch.bfloat16, num_experts=4, latent_attention=True))
    hasher.add(f"{layer}.shared_experts.up_proj.weight", up)
    hasher.add(f"{layer}.shared_experts.gate_proj.weight", gate)
    hasher.add(f"{layer}.gate.e_score_correction_bias", bias)
    assert hasher.checksums()[0] == {
        f"{layer}.shared_experts.gate_up_proj.weight": expected_hash(
            torch.cat([gate, up]).bfloat16()
        ),
        f"{layer}.gate.e_score_correction_bias": expected_hash(bias),
    }


def test_a_cpu_server_pads_the_width_of_mlps_with_zeros() -> None:
    """To 32 a rank, and to 32 for each of the shared experts, which are one MLP."""
    layer = "model.layers.1.mlp"
    up, down = torch.randn(80, 8), torch.randn(8, 80)
    layout = {"num_shared_experts": 2, "num_experts": 1}
    for device, width in (("cpu", 128), ("cuda", 80)):
        hasher = WeightHasher(ServedLayout(device, torch.float32, **layout))
        for name in ("shared_experts.gate_proj", "shared_experts.up_proj"):
            hasher.add(f"{layer}.{name}.weight", up)
        hasher.add(f"{layer}.shared_experts.down_proj.weight", down)
        hasher.add(f"{layer}.down_proj.weight", down)
        expert = 96 if device == "cpu" else 80
        wide = torch.cat([up, torch.zeros(width - 80, 8)])
        hashed = MixedWordHash if device == "cuda" else Sha256Hash
        assert hasher.checksums()[0] == {
            f"{layer}.shared_experts.gate_up_proj.weight": digest(hashed, wide, wide),
            f"{layer}.shared_experts.down_proj.weight": digest(
                hashed, torch.cat([down, torch.zeros(8, width - 80)], 1)
            ),
            f"{layer}.down_proj.weight": digest(
                hashed, torch.cat([down, torch.zeros(8, expert - 80)], 1)
            ),
        }


def test_deepseek_is_compared_on_a_cpu_alone() -> None:
    compared = {
        (family, device)
        for family in ("Qwen3Moe", "DeepseekV2", "DeepseekV3", "GptOss")
        for device in ("cpu", "cuda")
        if is_compared(f"{family}ForCausalLM", device)
    }
    deepseek = {("DeepseekV2", "cpu"), ("DeepseekV3", "cpu")}
    assert compared == {("Qwen3Moe", "cpu"), ("Qwen3Moe", "cuda")} | deepseek
