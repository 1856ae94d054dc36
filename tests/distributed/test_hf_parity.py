"""Logits and gradients against transformers, and the way back to Hugging Face bit for bit."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_prefix.batch import pack, plan_microbatches
from megatron_prefix.mcore.export import export_hf
from megatron_prefix.mcore.groups import initialize_megatron
from megatron_prefix.mcore.schedule import run_schedule
from tests.distributed.ranks import run_ranks
from tests.distributed.world import CPU, Case, World, build, model_config, rollouts
from tests.tiny_models import write_tiny_llama, write_tiny_qwen3

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
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
}


def folder_of(name: str, root: Path) -> Path:
    write, overrides = FAMILIES[name]
    return write(root / "model", vocab_size=61, num_hidden_layers=3, **overrides)


def prefix_logits(folder: Path, tp: int, pp: int) -> list[torch.Tensor] | None:
    """Last stage, rank 0 of its shards: [N, V/tp] of each microbatch, shards joined by rank."""
    initialize_megatron(1)
    model = build(model_config(folder, tp, pp), tp * pp, owner="student")
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


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 3)], ids=["one rank", "tp2", "pp3"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers(name: str, layout: tuple[int, int], tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path)
    tp, pp = layout
    ranks = run_ranks(tp * pp, prefix_logits, folder, tp, pp)
    shards = [torch.cat(logits) for logits in ranks if logits]
    assert len(shards) == tp
    logits = torch.cat(shards, dim=1)[:, :61]
    expected = transformers_logits(folder)
    assert (logits - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def exported(folder: Path, output: Path, tp: int, pp: int) -> None:
    initialize_megatron(1)
    model = build(model_config(folder, tp, pp), tp * pp, owner="student")
    export_hf(model, output, torch.float32)


@pytest.mark.parametrize("layout", [(1, 1), (2, 1), (1, 3)], ids=["one rank", "tp2", "pp3"])
@pytest.mark.parametrize("name", FAMILIES)
def test_export_is_bit_for_bit(name: str, layout: tuple[int, int], tmp_path: Path) -> None:
    folder = folder_of(name, tmp_path)
    run_ranks(layout[0] * layout[1], exported, folder, tmp_path / "out", *layout)
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
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, reference = (load(f, dtype=torch.float64) for f in (student, teacher))
    total = sum(len(r.prefix_ids) for r in rollouts(vocab=61))
    for rollout in rollouts(vocab=61):
        ids = torch.tensor([(*rollout.prompt_ids, *rollout.prefix_ids)[:-1]])
        first = len(rollout.prompt_ids) - 1
        log_p = model(ids).logits[0, first:].log_softmax(-1)
        with torch.no_grad():
            log_q = reference(ids).logits[0, first:].log_softmax(-1)
        ((log_p.exp() * (log_p - log_q)).sum() / total).backward()
    named = dict(model.named_parameters())
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
