"""Rows past the smaller of two padded vocabularies are no tokens, whichever model has them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.rollout.records import save_rollouts
from tests.distributed.ranks import run_ranks
from tests.distributed.test_separate_teacher import a_recipe, trained
from tests.distributed.world import Case, Run, model_config, rollouts, train
from tests.tiny_models import write_tiny_qwen3

TOKENS, PADDED = 62, 80
SIZES = {"num_key_value_heads": 4, "initializer_range": 0.05, "tie_word_embeddings": False}


def unpadded(folder: Path, target: Path) -> Path:
    """The same checkpoint without its rows from TOKENS on."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "vocab_size": TOKENS}))
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:TOKENS].contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_rollout_with_a_sampled_padding_id_is_left_out_alone(tmp_path: Path) -> None:
    """Its embedding is none of the teacher's, whose forward would fail on it."""
    for name, vocab_size in (("student", 272), ("teacher", 264)):
        write_tiny_qwen3(tmp_path / name, vocab_size=vocab_size, **SIZES)
        write_byte_tokenizer(tmp_path / name)
    sampled = rollouts(vocab=264)
    padding = replace(sampled[5], prefix_ids=(7, 264, *sampled[5].prefix_ids[2:]))
    save_rollouts(tmp_path / "with", 0, [*sampled[:5], padding, *sampled[6:]])
    save_rollouts(tmp_path / "without", 0, [*sampled[:5], *sampled[6:]])

    def losses(recording: str) -> list[float]:
        recipe = a_recipe(tmp_path, recording, (1, 1), (1, 1))
        replayed = replace(recipe.rollout, replay=str(tmp_path / recording))
        train = replace(recipe.train, steps=1)
        return trained(replace(recipe, rollout=replayed, train=train), steps=1).losses

    assert losses("with") == losses("without")


@pytest.mark.parametrize("tp", [1, 2])
def test_training_is_as_without_the_padding(tp: int, tmp_path: Path) -> None:
    write_tiny_qwen3(tmp_path / "student", vocab_size=PADDED, **SIZES)
    write_tiny_qwen3(tmp_path / "teacher", vocab_size=PADDED, seed=1, hidden_size=96, **SIZES)
    cut = {
        name: unpadded(tmp_path / name, tmp_path / f"{name} cut") for name in ("student", "teacher")
    }

    def trained(student: Path, teacher: Path) -> Run:
        case = Case(model_config(student, tp), model_config(teacher, tp))
        return run_ranks(tp, train, case, tp, 2)[0]

    exact = trained(cut["student"], cut["teacher"])
    for student, teacher in (
        (tmp_path / "student", cut["teacher"]),
        (cut["student"], tmp_path / "teacher"),
    ):
        found = trained(student, teacher)
        assert found.losses == pytest.approx(exact.losses, rel=1e-6)
        assert found.grad_norms == pytest.approx(exact.grad_norms, rel=2e-6)
