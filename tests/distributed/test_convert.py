"""The conversion tools on tiny models: bit for bit, whole or not at all, errors in one line."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_prefix.config import CheckpointConfig
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.mcore.checkpoint import Checkpointer
from megatron_prefix.mcore.contents import check_manifest, describe, read_step
from megatron_prefix.mcore.conversion import Conversion
from megatron_prefix.mcore.convert_to_hf import megatron_to_hf
from megatron_prefix.mcore.convert_to_megatron import STEP_FOLDER, hf_to_megatron
from megatron_prefix.mcore.export import INDEX, SHARD_BYTES
from megatron_prefix.mcore.hf_map import read_hf_model
from tests.distributed.ranks import run_ranks
from tests.distributed.world import Case, World, model_config, rollouts
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

TOOLS = Path(__file__).parents[2] / "tools"
WRITERS = {
    "llama": write_tiny_llama,
    "qwen2": write_tiny_qwen2,
    "qwen3": write_tiny_qwen3,
    "qwen3-moe": write_tiny_qwen3_moe,
    "mixtral": write_tiny_mixtral,
    "deepseek-v2": write_tiny_deepseek_v2,
    "deepseek-v3": write_tiny_deepseek_v3,
    "gpt-oss": write_tiny_gpt_oss,
}


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(name: str, *arguments: object) -> int:
    return tool(name).main([str(argument) for argument in arguments])


def to_megatron(folder: Path, output: Path, *more: object) -> int:
    return run_tool("convert_hf_to_megatron", "--hf-model", folder, "--output", output, *more)


def to_hf(checkpoint: Path, output: Path, *more: object) -> int:
    return run_tool("convert_megatron_to_hf", "--checkpoint", checkpoint, "--output", output, *more)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def check_equal(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert sorted(before) == sorted(after)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_tiny_qwen3(tmp_path / "model", vocab_size=265)
    write_byte_tokenizer(folder)
    return folder


def test_a_config_names_no_code_that_is_not_copied(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_qwen.Config"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "configuration_qwen.py").touch()
    assert to_megatron(model, tmp_path / "megatron") == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "back") == 0
    assert "auto_map" not in json.loads((tmp_path / "back" / "config.json").read_text())


@pytest.mark.parametrize("family", WRITERS)
def test_there_and_back_is_bit_for_bit(family: str, tmp_path: Path) -> None:
    folder = WRITERS[family](tmp_path / "model", vocab_size=61, num_hidden_layers=3)
    assert to_megatron(folder, tmp_path / "megatron") == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "back") == 0
    check_equal(tensors(folder), tensors(tmp_path / "back"))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def test_layers_of_multi_token_prediction_are_skipped_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_tiny_deepseek_v3(tmp_path / "model", num_nextn_predict_layers=1)
    before = tensors(folder)
    edit(folder, lambda held: held.update({"model.layers.2.eh_proj.weight": torch.ones(4, 4)}))
    assert to_megatron(folder, tmp_path / "megatron") == 0
    assert "1 tensors of multi-token prediction (model.layers.2.*) are skipped" in caplog.text
    assert to_hf(tmp_path / "megatron", tmp_path / "back") == 0
    check_equal(before, tensors(tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0


def test_a_routers_bias_stays_in_fp32(tmp_path: Path) -> None:
    folder = write_tiny_deepseek_v3(tmp_path / "model")
    assert to_megatron(folder, tmp_path / "megatron", "--dtype", "bf16") == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "back") == 0
    before, after = tensors(folder), tensors(tmp_path / "back")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(before[bias], after[bias])
    assert {t.dtype for name, t in after.items() if name != bias} == {torch.bfloat16}


def test_the_folder_is_complete_and_its_index_right(model: Path, tmp_path: Path) -> None:
    assert to_megatron(model, tmp_path / "megatron", "--dtype", "bf16") == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "back") == 0
    back = tmp_path / "back"
    index = json.loads((back / "model.safetensors.index.json").read_text())
    found = tensors(back)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    assert sorted(index["weight_map"]) == sorted(found)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (model / name).read_bytes()
    assert transformers.AutoTokenizer.from_pretrained(back).chat_template


@pytest.mark.parametrize(
    ("family", "dtype"), [("deepseek-v3", "fp32"), ("deepseek-v3", "fp8"), ("gpt-oss", "bf16")]
)
def test_an_index_of_several_files_says_what_is_in_them(
    family: str, dtype: str, tmp_path: Path
) -> None:
    folder = WRITERS[family](tmp_path / "model")
    hf = read_hf_model(str(folder))
    to = Conversion(hf, tmp_path / "megatron", "fp32", shard_bytes=40_000)
    hf_to_megatron(to, lambda size: None)
    back = Conversion(hf, tmp_path / "back", dtype, shard_bytes=40_000)
    megatron_to_hf(back, read_step(to.output / STEP_FOLDER), lambda size: None)
    files = {file.name: load_file(file) for file in back.output.glob("*.safetensors")}
    index = json.loads((back.output / INDEX).read_text())
    assert len(files) > 2
    assert index["weight_map"] == {name: file for file, held in files.items() for name in held}
    held = [tensor for file in files.values() for tensor in file.values()]
    assert len(held) == len(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held)


def test_a_file_is_one_that_a_hub_takes() -> None:
    assert SHARD_BYTES < 5e9


def small_files(folder: Path, output: Path, dtype: str, ranks: int) -> Conversion:
    return Conversion(read_hf_model(str(folder)), output, dtype, ranks, shard_bytes=40_000)


def test_several_processes_share_the_files(model: Path, tmp_path: Path) -> None:
    sizes: list[int] = []
    job = small_files(model, tmp_path / "megatron", "fp32", 2)
    hf_to_megatron(job, sizes.append)
    step = tmp_path / "megatron" / STEP_FOLDER
    assert len(list(step.glob("*.distcp"))) == len(job.files) > 2
    assert sum(sizes) >= job.bytes  # and the vocabulary's padding
    assert check_manifest(step) == len(list(step.iterdir())) - 1
    back = small_files(model, tmp_path / "back", "fp32", 2)
    megatron_to_hf(back, read_step(step), sizes.append)
    check_equal(tensors(model), tensors(tmp_path / "back"))
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 80_000 for file in files)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")


def save_trained(case: Case, folder: Path) -> dict[str, torch.Tensor]:
    """Two steps and two checkpoints of a run; rank 0 gives the weights after the first."""
    world = World.build(case, torch.distributed.get_world_size())
    checkpointer = Checkpointer(folder, world.student, CheckpointConfig(async_save=False))
    weights = {}
    for step in (1, 2):
        world.step(rollouts(seed=step))
        world.student.update()
        if step == 1:
            weights = world.weights()
        checkpointer.save(step, {"layout": checkpointer.layout_record()}, wait=True)
    return weights


def test_a_runs_checkpoint_of_any_layout_becomes_a_folder(tmp_path: Path) -> None:
    student = write_tiny_qwen3(tmp_path / "model", vocab_size=62)
    config = model_config(student, tp=2)
    case = Case(config, replace(config, tensor_model_parallel_size=1))
    trained, _ = run_ranks(2, save_trained, case, tmp_path / "run" / "checkpoints")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert to_hf(checkpoints, tmp_path / "out", "--hf-model", student, "--step", 1) == 0
    check_equal(trained, tensors(tmp_path / "out"))
    run = tmp_path / "run"
    assert to_hf(run, run / "export", "--hf-model", student, "--step", 1) == 0
    check_equal(trained, tensors(run / "export"))
    found = describe(run)
    assert found == describe(checkpoints / "step_00000002")
    assert found["layout"] == {"tp": 2, "cp": 1, "dp": 1, "pp": 1, "ep": 1, "etp": 2}
    assert found["step"] == 2
    assert found["optimizer_tensors"] > 0
    assert found["checksums"].endswith("files verified")


def check_refused(capfd: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert "error: " in said
    assert [word for word in words if word not in said] == []


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file)


def test_every_wrong_tensor_is_named_at_once(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        del held["model.norm.weight"]
        held["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 5)
        held["model.layers.7.extra"] = torch.zeros(1)

    edit(model, change)
    words = ("model.norm.weight is missing", "up_proj.weight has shape [3, 5]", "7.extra has no")
    check_refused(capfd, to_megatron(model, tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_named(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def change(held: dict[str, torch.Tensor]) -> None:
        held["model.layers.0.mlp.up_proj.weight"][3, 4] = float("nan")
        held["model.layers.1.self_attn.q_norm.weight"][1] = float("inf")

    edit(model, change)
    code = to_megatron(model, tmp_path / "out")
    check_refused(capfd, code, "layers.0.mlp.up_proj.weight", "layers.1.self_attn.q_norm.weight")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_values_that_the_written_precision_does_not_hold_are_named(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit(model, lambda held: held[name][3].fill_(3.4e38))
    for dry in ([], ["--dry-run"]):
        code = to_megatron(model, tmp_path / "out", "--dtype", "bf16", *dry)
        check_refused(capfd, code, f"not finite in 1 tensors: {name}")
    assert to_megatron(model, tmp_path / "megatron", "--dtype", "fp32") == 0
    check_refused(capfd, to_hf(tmp_path / "megatron", tmp_path / "out", "--dtype", "bf16"), name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "model"]


def test_a_dry_run_writes_nothing(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert to_megatron(model, tmp_path / "megatron", "--dry-run") == 0
    assert "would write" in capfd.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert to_megatron(model, tmp_path / "megatron") == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "back", "--dry-run") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron", "model"]


def test_another_models_config_is_refused_by_name(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny_llama(tmp_path / "other", vocab_size=265)
    assert to_megatron(model, tmp_path / "megatron") == 0
    code = to_hf(tmp_path / "megatron", tmp_path / "out", "--hf-model", other)
    check_refused(capfd, code, "output_layer.weight is missing", "does not hold the model")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "nowhere"], "--checkpoint nowhere is no folder"),
        (["--checkpoint", "model"], "--checkpoint model holds no step_* folder"),
        (["--checkpoint", "megatron", "--step", "7"], "--step 7 is not in"),
        (["--checkpoint", f"megatron/{STEP_FOLDER}", "--step", "7"], "--step 7 is not megatron/"),
        (["--checkpoint", "megatron", "--ranks", "-1"], "--ranks -1 must be 1 or more"),
    ],
)
def test_arguments_that_cannot_be(
    arguments: list[str],
    words: str,
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[1].startswith("megatron"):
        assert to_megatron(model, tmp_path / "megatron") == 0
    check_refused(capfd, run_tool("convert_megatron_to_hf", *arguments, "--output", "out"), words)
