"""Logits and gradients against transformers, and the way back to Hugging Face bit for bit."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_prefix.batch import pack, plan_microbatches
from megatron_prefix.config import ModelConfig
from megatron_prefix.layout import model_layout
from megatron_prefix.mcore import weights
from megatron_prefix.mcore.export import export_hf
from megatron_prefix.mcore.groups import initialize_megatron
from megatron_prefix.mcore.schedule import run_schedule
from megatron_prefix.mcore.weights import WeightGatherer
from tests.distributed.dense import Dense
from tests.distributed.ranks import run_ranks
from tests.distributed.world import CPU, Case, World, build, model_config, rollouts
from tests.tiny_models import (
    write_tiny_deepseek_v2,
    write_tiny_deepseek_v3,
    write_tiny_gpt_oss,
    write_tiny_llama,
    write_tiny_mixtral,
    write_tiny_qwen2,
    write_tiny_qwen3,
    write_tiny_qwen3_moe,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
FAMILIES = {
    "qwen3": (write_tiny_qwen3, {}),
    "qwen3 untied, odd head size": (
        write_tiny_qwen3,
        {"tie_word_embeddings": False, "head_dim": 24, "num_key_value_heads": 4},
    ),
    "llama": (write_tiny_llama, {}),
    "llama tied, llama3 rope": (
        write_tiny_llama,
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "max_position_embeddings": 16384},
    ),
    "qwen2": (write_tiny_qwen2, {}),
    "qwen2.5 untied, one group": (
        write_tiny_qwen2,
        {"tie_word_embeddings": False, "num_key_value_heads": 4},
    ),
    "qwen3-moe": (write_tiny_qwen3_moe, {}),
    "qwen3-moe, a dense layer, weights as they are": (
        write_tiny_qwen3_moe,
        {"mlp_only_layers": [0], "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
    "mixtral": (write_tiny_mixtral, {}),
    "deepseek-v3": (write_tiny_deepseek_v3, {}),
    "deepseek-v2, groups": (
        write_tiny_deepseek_v2,
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek-v2-lite": (write_tiny_deepseek_v2, {"q_lora_rank": None, "rope_parameters": PLAIN}),
    "gpt-oss": (write_tiny_gpt_oss, {}),
}
DENSE = ("qwen3", "qwen2", "llama")
SPARSE = [name for name in FAMILIES if "moe" in name or not name.startswith(DENSE)]


def folder_of(name: str, root: Path) -> Path:
    write, overrides = FAMILIES[name]
    return write(root / "model", vocab_size=61, num_hidden_layers=3, **overrides)


# Ranks, and the layout of the model over them. Experts want sequence parallelism beside tp.
DENSE_LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one rank": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp3": (3, {"pp": 3}),
}
SPARSE_LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "one rank": (1, {}),
    "tp2": (2, {"tp": 2, "sequence_parallel": True}),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2, ep2, whole experts": (
        2,
        {
            "tp": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
    ),
    "tp2, dp2, ep4": (
        4,
        {
            "tp": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 4,
            "expert_tensor_parallel_size": 1,
        },
    ),
    "pp2, ep2": (4, {"pp": 2, "expert_model_parallel_size": 2}),
    "tp2, dp2, ep2, cut experts": (
        4,
        {"tp": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
    ),
}
CUT_EXPERTS = ("tp2", "tp2, dp2, ep2, cut experts")
CASES = [
    pytest.param(name, *layout, id=f"{name}: {title}")
    for name in FAMILIES
    for title, layout in (SPARSE_LAYOUTS if name in SPARSE else DENSE_LAYOUTS).items()
    if name != "gpt-oss" or title not in CUT_EXPERTS  # experts with biases are not cut
]


def prefix_logits(config: ModelConfig, world_size: int) -> list[torch.Tensor] | None:
    """On the last stage [N, V/tp] of each microbatch."""
    initialize_megatron(1)
    model = build(config, world_size, owner="student")
    plan = plan_microbatches(rollouts(vocab=61), 2, multiple=8)
    batches = [pack(rollouts(vocab=61), plan, m, CPU) for m in range(2)]
    with torch.no_grad():
        return run_schedule(
            model, model.module, batches, lambda b, h, w: h @ w.T, forward_only=True
        )


def transformers_logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sampled = rollouts(vocab=61)
    plan = plan_microbatches(sampled, 2, multiple=8)
    rows = []
    for index in (i for members in plan.members for i in members):
        rollout = sampled[index]
        ids = torch.tensor([(*rollout.prompt_ids, *rollout.prefix_ids)[:-1]])
        with torch.no_grad():
            rows.append(model(ids).logits[0, len(rollout.prompt_ids) - 1 :])
    return torch.cat(rows)


@pytest.mark.parametrize(("name", "world_size", "settings"), CASES)
def test_logits_equal_transformers(
    name: str, world_size: int, settings: dict, tmp_path: Path
) -> None:
    folder = folder_of(name, tmp_path)
    config = model_config(folder, **settings)
    ranks = run_ranks(world_size, prefix_logits, config, world_size)
    layout, expected = model_layout(config, world_size), transformers_logits(folder)
    for replica in range(layout.dp):
        shards = [torch.cat(ranks[rank]) for rank in layout.last_stage(replica)]
        logits = torch.cat(shards, dim=1)[:, :61]
        assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def exported(config: ModelConfig, output: Path, world_size: int) -> int:
    """How many buckets the rank heard of."""
    initialize_megatron(1)
    heard: list[int] = []
    student = build(config, world_size, owner="student")
    export_hf(student, output, torch.float32, on_bucket=lambda: heard.append(1))
    return len(heard)


@pytest.mark.parametrize(("name", "world_size", "settings"), CASES)
def test_export_is_bit_for_bit(name: str, world_size: int, settings: dict, tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path)
    config = model_config(folder, **settings)
    (heard,) = set(run_ranks(world_size, exported, config, tmp_path / "out", world_size))
    assert heard == len(list((tmp_path / "out").glob("*.safetensors")))
    before = load_file(folder / "model.safetensors")
    after = {
        key: tensor
        for file in (tmp_path / "out").glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }
    assert sorted(before) == sorted(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.config.vocab_size == 61
    assert not (tmp_path / "out.partial").exists()


def gathered_twice(config: ModelConfig, world_size: int) -> tuple[int, list[int], bool]:
    """Buckets of a gathering; walks over all parameters after one and after two; whether the second
    brought what the parameters were then."""
    initialize_megatron(1)
    model = build(config, world_size, owner="student")
    with patch.object(weights, "named_units", wraps=weights.named_units) as walk:
        gatherer = WeightGatherer(model)
        first = [dict(bucket) for bucket in gatherer.buckets(1 << 12, torch.float32)]
        walks = [walk.call_count]
        with torch.no_grad():
            for param in model.module.parameters():
                param.mul_(2.0)
        second = [dict(bucket) for bucket in gatherer.buckets(1 << 12, torch.float32)]
        walks.append(walk.call_count)
    doubled = all(
        torch.equal(2.0 * before[name], after[name])
        for before, after in zip(first, second, strict=True)
        for name in before
    )
    return len(first), walks, doubled


@pytest.mark.parametrize("settings", [{}, {"expert_model_parallel_size": 2}])
def test_parameters_are_named_once_for_all_buckets(settings: dict, tmp_path: Path) -> None:
    config = model_config(folder_of("mixtral", tmp_path), **settings)
    for buckets, walks, doubled in run_ranks(2, gathered_twice, config, 2):
        assert buckets > 8
        assert walks == [1, 1]
        assert doubled


def first_step_gradients(case: Case) -> dict[str, torch.Tensor]:
    """main_grad of every parameter at tensor parallel 1, by Megatron's name."""
    world = World.build(case, 1)
    world.step(rollouts(vocab=61))
    return {
        name: param.main_grad.detach().clone()
        for name, param in world.student.model.module.named_parameters()
    }


def test_gradients_equal_autograd_through_transformers(tmp_path: Path) -> None:
    """The whole step against full logits in transformers and autograd in fp64."""
    student = write_tiny_qwen3(tmp_path / "student", vocab_size=61)
    teacher = write_tiny_qwen3(tmp_path / "teacher", vocab_size=61, hidden_size=96, seed=3)
    (gradients,) = run_ranks(
        1, first_step_gradients, Case(model_config(student), model_config(teacher))
    )
    dense = Dense.load((student, teacher))
    total = sum(len(r.prefix_ids) for r in rollouts(vocab=61))
    for rollout in rollouts(vocab=61):
        (dense.kl(rollout).sum() / total).backward()
    named = dict(dense.student.named_parameters())
    pairs = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "decoder.layers.1.mlp.linear_fc2.weight": "model.layers.1.mlp.down_proj.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight": (
            "model.layers.0.self_attn.q_norm.weight"
        ),
        "decoder.layers.0.self_attention.linear_proj.weight": (
            "model.layers.0.self_attn.o_proj.weight"
        ),
    }
    for megatron, hf in pairs.items():
        expected = named[hf].grad
        mine = gradients[megatron][: len(expected)].double()
        assert (mine - expected).norm() <= 5e-6 * expected.norm(), megatron
