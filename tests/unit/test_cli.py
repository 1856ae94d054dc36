"""The command line: one-line errors, exit codes, help that teaches, and doctor's answers."""

import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megatron_prefix.cli import main
from megatron_prefix.config import DataConfig, ModelConfig, PrefixConfig, Recipe, TrainConfig
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.doctor import Finding, Findings, examine, findings_json, print_findings
from megatron_prefix.recipe import save_record
from tests.tiny_models import write_tiny_qwen3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound recipe's record, recipe.yaml, with its model and prompts beside it."""
    folder = tmp_path_factory.mktemp("sound")
    write_tiny_qwen3(folder / "model", vocab_size=264)
    write_byte_tokenizer(folder / "model")
    (folder / "prompts.jsonl").write_text('{"prompt": "2+2?"}\n')
    model = ModelConfig(hf_path=str(folder / "model"))
    recipe = Recipe(
        student=model,
        teacher=replace(model, pipeline_model_parallel_size=2),
        data=DataConfig(path=str(folder / "prompts.jsonl"), max_prompt_length=64),
        prefix=PrefixConfig("linear", 9, 75),
        train=TrainConfig(steps=10, global_batch_size=16, micro_batch_size=4),
    )
    save_record(recipe, folder)
    return folder


@pytest.fixture
def record(folder: Path) -> str:
    return str(folder / "recipe.yaml")


def test_plan_prints_tables(record: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", record]) == 0
    shown = capsys.readouterr().out
    assert "Models over 2 ranks" in shown
    assert "linear: 10 steps of 16 rollouts" in shown


def test_plan_warns_of_settings_that_the_run_never_comes_to(
    record: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", record, "--json", "--quick", "prefix.policy=anchored"]
    assert main([*words, "prefix.anchored.every=10"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*words, "prefix.anchored.every=11"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["cost"]["longest_prefix"] == 9
    sentence = "prefix.policy=anchored stays at prefix.min_length=9 in all of train.steps=10"
    assert told.err == f"megatron-prefix: warning: {sentence}\n"


def test_plan_warns_of_fp8_that_few_cards_have(
    record: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", record, "--json", "--quick", "teacher.fp8.format=e4m3"]
    assert main([*words, "teacher.fp8.recipe=nvfp4"]) == 0
    told = capsys.readouterr()
    assert json.loads(told.out)["recipe"]["teacher"]["fp8"]["recipe"] == "nvfp4"
    assert told.err.startswith(
        "megatron-prefix: warning: teacher.fp8.recipe=nvfp4 needs Blackwell cards"
    )


def test_plan_prints_json_with_overrides_on_either_side_of_options(
    record: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlay = tmp_path / "more.yaml"
    overlay.write_text("train: {steps: 5, seed: 7}")
    words = ["plan", record, "train.steps=6", "--overlay", str(overlay), "--json", "--quick"]
    assert main([*words, "prefix.policy=fixed"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["recipe"]["train"]["steps"] == 6
    assert plan["recipe"]["train"]["seed"] == 7
    assert plan["recipe"]["prefix"]["policy"] == "fixed"
    assert plan["world_size"] == 2


@pytest.mark.parametrize("command", ["plan", "train"])
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "Did you mean 'train.steps'"),
        ("train.steps=many", "train.steps='many' must be a whole number (int)"),
        ("train.global_batch_size=3", "train.global_batch_size=3 must be a multiple of"),
        ("student.hf_path=nowhere", "student.hf_path=nowhere is no folder"),
        ("data.prompt_column=question", "question"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    command: str,
    override: str,
    message: str,
    record: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([command, record, override, f"run.output_dir={tmp_path / 'runs'}"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("megatron-prefix: error: ")
    assert told.err.count("\n") == 1
    assert message in told.err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["plan", "train", "launch"])
def test_what_does_not_fit_is_refused_before_anything_starts(
    command: str, record: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A card of the reserve and 100 KiB."""
    limit = ["run.gpu_memory_gib=6.0001", "run.gpu_reserve_gib=6", "train.micro_batch_size=2"]
    away = ["rollout.server_urls=[http://127.0.0.1:1]", f"run.output_dir={tmp_path / 'runs'}"]
    quick = ["--quick"] if command == "plan" else []
    assert main([command, record, *limit, *away, *quick]) == 2
    told = capsys.readouterr().err
    assert told.startswith("megatron-prefix: error: does not fit: rank ")
    assert "GiB, and 0.0 of the card's 6.0 are free (6.0 are reserved)" in told
    assert told.count("\n") == 1 and not (tmp_path / "runs").exists()
    assert told.endswith("starts it all the same\n") == (command != "plan")


def test_train_refuses_a_folder_with_a_run_where_told_not_to_resume(
    record: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_record(Recipe(), tmp_path / "run")
    words = ["train", record, f"run.output_dir={tmp_path}"]
    assert main([*words, "--no-resume"]) == 2
    assert "holds a run; set another run.name" in capsys.readouterr().err
    assert main(words) == 2
    assert "holds another recipe's run: student.hf_path is ''" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["plan"], ["doctor", "extra"], ["plan", "x", "--jsn"], []])
def test_words_that_make_no_command_end_with_2(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "usage: megatron-prefix" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan"], "megatron-prefix plan: error: the following arguments are required: RECIPE\n"),
        (["advise"], "advise: error: the following arguments are required: RUN|RECIPE\n"),
        (["trian", "x"], "megatron-prefix: error: no command 'trian'. Did you mean 'train'?\n"),
        (["plan", "x", "--jsn"], "megatron-prefix plan: error: unrecognized arguments: --jsn\n"),
    ],
)
def test_words_that_make_no_command_are_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    told = capsys.readouterr().err
    assert told.endswith(message)
    if message.startswith("megatron-prefix plan"):
        assert told.startswith("usage: megatron-prefix plan [-h]")


def test_what_is_no_recipe_is_told_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder.parent / "notes.md").write_text("no recipe\n")
    (folder.parent / "others").mkdir(exist_ok=True)
    for source, message in {
        folder.name: f"{folder.name} is a run's folder; give {folder.name}/recipe.yaml",
        "others": "others is a folder; give a recipe's file",
        "notes.md": "recipe notes.md must end in .py or .yaml",
    }.items():
        assert main(["train", source]) == 2
        assert capsys.readouterr().err.startswith(f"megatron-prefix: error: {message}")
    assert main(["advise", "nothere"]) == 2
    assert "nothere is no run's folder (no recipe.yaml), and recipe" in capsys.readouterr().err


def test_gpus_of_no_node_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--gpus", "0"]) == 2
    assert "--gpus 0 is asked of --node FOLDER alone" in capsys.readouterr().err


HELP = ["", "train", "plan", "launch", "status", "logs", "cancel", "prepare", "doctor"]


@pytest.mark.parametrize("command", HELP)
def test_help_shows_examples_and_exit_codes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"megatron-prefix {command}".strip() in shown.partition("examples:")[2]
    assert "75  stopped by a signal" in shown
    assert all(len(line) <= 100 for line in shown.splitlines())


def test_doctor_finds_what_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    by_name = {finding["name"]: finding for finding in told["findings"]}
    assert by_name["torch"] == {
        "name": "torch",
        "state": "ok",
        "found": torch.__version__.partition("+")[0],
        "remedy": "",
    }
    assert by_name["gloo"]["state"] == "ok"
    assert told["cpu_path"] is True
    assert told["engine"].startswith("GPU" if torch.cuda.is_available() else "CPU")
    assert {"fp32", "bf16"} <= set(told["precisions"])
    if not torch.cuda.is_available():
        assert told["fp8_recipes"] == []


def test_doctor_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "megatron-core" in shown
    assert "This machine can run the main job on its CPU." in shown


def test_doctor_fails_where_something_needed_is_missing() -> None:
    ok = Finding("torch", "ok", "2")
    absent = Finding("gpu", "absent", "none")
    missing = Finding("sglang", "missing", "not installed", "make env '.[gpu]'")
    assert Findings((ok, absent), "CPU", ("fp32",), ()).cpu_path
    lacking = Findings((ok, absent, missing), "CPU", ("fp32",), ())
    assert not lacking.cpu_path
    assert json.loads(findings_json(lacking))["cpu_path"] is False
    text = io.StringIO()
    print_findings(lacking, Console(file=text, width=100))
    assert "sglang: make env '.[gpu]'\n" in text.getvalue()
    assert "cannot yet run" in text.getvalue()


def test_doctor_sees_no_compiler_and_no_slurm_on_an_empty_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    by_name = {finding.name: finding for finding in examine().findings}
    assert by_name["C++ compiler"].state == "absent"
    assert "apt-get install g++" in by_name["C++ compiler"].remedy
    assert by_name["slurm"].state == "absent"
    assert "sbatch" in by_name["slurm"].found
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    by_name = {finding.name: finding for finding in examine().findings}
    assert by_name["C++ compiler"].found == str(tmp_path / "c++")


def test_a_reader_that_leaves_early_is_no_error(
    record: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            return spare.fileno()

    with open("/dev/null", "w") as spare:
        monkeypatch.setattr(sys, "stdout", Closed())
        assert main(["plan", record, "--json", "--quick"]) == 1
