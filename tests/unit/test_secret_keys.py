"""No secret in a recipe, in its record or in a script: references to the environment alone."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prefix.cli import build_parser, main
from megatron_prefix.commands.launch_arguments import cluster_of
from megatron_prefix.config import DataConfig, ModelConfig, Recipe, RolloutConfig
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.jobs.cluster import Cluster, check_cluster, trainer_script
from megatron_prefix.recipe import fingerprint, load_recipe, load_record, save_record
from megatron_prefix.rollout.addresses import recipe_endpoints
from megatron_prefix.secret_keys import check_secrets, key_prefix, names_a_secret, resolve
from tests.tiny_models import write_tiny_qwen3

SECRET = "a $(secret) 'of ours"
REFERENCE = "${oc.env:OUR_SERVERS_KEY}"
TOKEN = "hf_" + 17 * "a1"


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A sound recipe's, in the folder where commands are given."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUR_SERVERS_KEY", SECRET)
    write_byte_tokenizer(write_tiny_qwen3(tmp_path / "model", vocab_size=264))
    Path("prompts.jsonl").write_text('{"prompt": "2+2?"}\n')
    model = ModelConfig(hf_path="model")
    data = DataConfig(path="prompts.jsonl", max_prompt_length=64)
    recipe = Recipe(student=model, teacher=model, data=data)
    recipe = replace(recipe, prefix=replace(recipe.prefix, max_length=75))
    return str(save_record(recipe, tmp_path / "sound"))


def test_a_reference_is_recorded_as_it_stands_and_read_where_it_is_used(
    record: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rollout.server_urls=[http://a:1]", f"rollout.api_key={REFERENCE}"]
    assert main(["prepare", record, *words, "run.name=ours"]) == 0
    written = Path(capsys.readouterr().out.strip())
    recipe = load_record(written)
    assert recipe.rollout.api_key == REFERENCE
    assert [endpoint.api_key for endpoint in recipe_endpoints(recipe.rollout)] == [SECRET]
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and SECRET in f.read_text("latin-1")]


def test_whose_key_it_is_makes_no_other_run() -> None:
    ours = Recipe(rollout=RolloutConfig(api_key=REFERENCE))
    assert fingerprint(ours) == fingerprint(Recipe())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rollout.api_key=sesame", "export it as a variable and set rollout.api_key='${oc.env:"),
        ("rollout.api_key=${oc.env:NOT_THERE_sesame}", "there is no NOT_THERE"),
        ("rollout.server_args=[--api-key,sesame]", "gets a random key of its own"),
        ("rollout.server_args=[--admin-api-key=sesame]", "--admin-api-key would be on a command"),
        ("teacher.server.args=[--api-key,sesame]", "teacher.server.args: --api-key would be on"),
        (
            "teacher.server.urls=[http://me:sesame@a:1]",
            "give the key by teacher.server.api_key_file",
        ),
        ("rollout.server_urls=[http://me:sesame@a:1]", "the one at a holds a user or a password"),
        (
            f"data.system_prompt=use {TOKEN}",
            "data.system_prompt holds what looks like a key (hf",
        ),
        (f"teachers.big.hf_path={TOKEN}", "teachers.big.hf_path holds what looks like a key"),
    ],
)
@pytest.mark.parametrize("command", ["train", "prepare", "launch"])
def test_a_secret_is_refused_without_being_shown(
    command: str, setting: str, message: str, record: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, record, setting, "run.name=other"]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    shown = (told.err + told.out).replace("NOT_THERE_sesame", "")
    assert "sesame" not in shown and TOKEN not in shown
    assert not Path("runs").exists()


def test_two_ways_to_say_one_key_are_one_too_many(
    record: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"rollout.api_key={REFERENCE}", "rollout.api_key_file=model/config.json"]
    assert main(["prepare", record, *words]) == 2
    assert "two ways to say one" in capsys.readouterr().err


def test_a_reference_that_comes_with_a_file_or_an_overlay_stays_one(
    record: str, tmp_path: Path
) -> None:
    overlay = tmp_path / "more.yaml"
    overlay.write_text(f'rollout: {{api_key: "{REFERENCE}"}}\n')
    recipe = load_recipe(record, str(overlay))
    check_secrets(recipe)
    assert recipe.rollout.api_key == REFERENCE
    assert resolve("rollout.api_key", recipe.rollout.api_key) == SECRET
    assert resolve("rollout.api_key", "") == ""


@pytest.mark.parametrize(
    ("text", "begin"),
    [
        (TOKEN, "hf_"),
        ("sk-proj-" + 10 * "Ab3_", "sk-"),
        ("see ghp_" + 18 * "a1", "ghp_"),
        ("AKIA" + 8 * "A1", "AKIA"),
        ("models/hf_qwen3_235b_a22b_instruct_2507_merged", ""),
        ("use sk-learn-and-its-documentation", ""),
        ("task-1234567890123456789012345", ""),
        ("", ""),
    ],
)
def test_keys_are_known_by_how_they_begin(text: str, begin: str) -> None:
    assert key_prefix(text) == begin


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "password"])
def test_variables_that_are_called_like_secrets(name: str) -> None:
    assert names_a_secret(name)
    assert not names_a_secret(f"{name}_PATH")
    assert not names_a_secret("TOKENIZERS_PARALLELISM")
    assert not names_a_secret("MAX_TOKENS")


@pytest.mark.parametrize("variable", ["HF_TOKEN=sesame", f"HARMLESS={TOKEN}"])
def test_a_secret_for_the_steps_is_refused_without_being_shown(
    variable: str, record: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", record, "--executor", "slurm", "--env", variable]) == 2
    told = capsys.readouterr().err
    assert "would write a secret into the steps' scripts" in told
    assert "sesame" not in told and TOKEN not in told


def test_a_steps_script_refers_to_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    words = ["launch", "quickstart", "--env", "HF_TOKEN", "--env", f"OTHER_KEY={REFERENCE}"]
    cluster = cluster_of(build_parser().parse_args(words))
    check_cluster(cluster, Recipe())
    tool = tmp_path / "tool"
    tool.write_text(
        f"#!{sys.executable}\nimport json, os\n"
        "print(json.dumps([os.environ['HF_TOKEN'], os.environ['OTHER_KEY']]))\n"
    )
    tool.chmod(0o755)
    script = trainer_script(replace(cluster, python=str(tool)), tmp_path / "r" / "x", tmp_path)
    assert SECRET not in script
    told = subprocess.run(
        ["bash", "-s"], input=script, capture_output=True, text=True, check=True,
        env={"HF_TOKEN": SECRET, "OUR_SERVERS_KEY": "other", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert json.loads(told.stdout) == [SECRET, "other"]
    lost = subprocess.run(["bash", "-s"], input=script, capture_output=True, text=True, env={})
    assert lost.returncode != 0
    assert "HF_TOKEN: was not in the environment of sbatch" in lost.stderr
    assert not Cluster().env
