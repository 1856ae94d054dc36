import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from megatron_prefix.data.tokenizers import load_tokenizer, stop_token_ids
from megatron_prefix.tasks import sort_chain


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "make_toy_models.py"
    spec = importlib.util.spec_from_file_location("make_toy_models", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tiny(tool: ModuleType, *stages: Any) -> Any:
    return tool.ToyModel(16, 1, 32, stages, seed=3)


def test_training_lowers_the_loss_and_is_the_same_again(tool: ModuleType) -> None:
    rows = sort_chain.make_sft_rows(64, np.random.default_rng(9))
    toy = tiny(tool, tool.Stage("corrupt", 30, 1e-2), tool.Stage("sorted", 5, 1e-3))
    fresh = tool.build_model(toy)
    first, again = (tool.train_model("tiny", toy, Progress(disable=True)) for _ in range(2))
    assert tool.sft_loss(first, rows) < 0.8 * tool.sft_loss(fresh, rows)
    for ours, theirs in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_loss_leaves_masked_tokens_out(tool: ModuleType) -> None:
    model = tool.build_model(tiny(tool))
    rows = sort_chain.make_sft_rows(8, np.random.default_rng(1))
    only = np.zeros_like(rows.loss_mask)
    only[:, 40] = True
    masked = sort_chain.SftRows(rows.input_ids, only)
    ids = torch.from_numpy(rows.input_ids)
    logprobs = model(ids).logits.log_softmax(-1)[:, 39].gather(1, ids[:, 40:41])
    assert tool.sft_loss(model, masked).item() == pytest.approx(-logprobs.mean().item(), rel=1e-5)


def test_the_learning_rate_warms_up_and_decays(tool: ModuleType) -> None:
    stage = tool.Stage("sorted", 100, 2.0, warmup_steps=10, final_lr=0.1)
    assert tool.lr_at(stage, 0) == pytest.approx(0.2)
    assert tool.lr_at(stage, 50) == pytest.approx(2.0 * 0.55)
    assert tool.lr_at(stage, 99) == pytest.approx(2.0 * 0.109)
    assert tool.lr_at(tool.Stage("sorted", 20, 3.0), 0) == 3.0


def test_scores_are_percentages_of_greedy_answers(tool: ModuleType) -> None:
    model = AutoModelForCausalLM.from_pretrained(sort_chain.model_folder("student_a")).eval()
    accuracy, plan, execution = tool.held_out_scores(model, 100)
    assert 5 < accuracy < 30 and 5 < plan < 30 and execution > 95
    assert tool.held_out_scores(tool.build_model(tiny(tool)).eval(), 10) == (0.0, 0.0, 0.0)


def test_the_command_writes_a_folder_that_loads(
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(tool.MODELS, "student_b", tiny(tool, tool.Stage("sorted", 2, 1e-3)))
    tool.main(["--only", "student_b", "--output", str(tmp_path), "--held-out", "4"])
    folder = tmp_path / "student_b"
    assert [path.name for path in tmp_path.iterdir()] == ["student_b"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings and model.dtype == torch.float32
    assert stop_token_ids(str(folder)) == (2,) and len(load_tokenizer(str(folder))) == 46
    assert "student_b" in capsys.readouterr().out
    other = tmp_path / "other"
    tool.main(["--only", "student_b", "--seed", "4", "--output", str(other), "--held-out", "4"])
    reseeded = AutoModelForCausalLM.from_pretrained(other / "student_b")
    assert not torch.equal(reseeded.lm_head.weight, model.lm_head.weight)


def test_an_unknown_model_is_refused(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.parse_args(["--only", "student_c"])
    assert "invalid choice: 'student_c'" in capsys.readouterr().err


def test_a_seed_is_for_one_model(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.parse_args(["--seed", "7"])
    assert "--seed 7 is for one model; name it with --only" in capsys.readouterr().err
