"""``megatron-prefix launch`` without a cluster: its scripts, its quoting, its words on bad input.

A golden file that is not there is written, and the test fails once: read it and keep it.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prefix.cli import build_parser, main
from megatron_prefix.commands.launch_arguments import cluster_of
from megatron_prefix.config import DataConfig, EvalConfig, ModelConfig, Recipe, RolloutConfig
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.jobs.cluster import (
    Cluster,
    check_cluster,
    on_cluster,
    server_script,
    trainer_script,
)
from megatron_prefix.recipe import save_record
from tests.tiny_models import write_tiny_qwen3

GOLDEN = Path(__file__).parents[1] / "golden"
HOME = "/cluster/nemo"
ODD = 'it\'s  "$(touch INJECTED)" `touch INJECTED` $HOME $$ \\ /nemo_run\n2nd line'
ONE_NODE = ["--gpus-per-node", "8", "--python", "python3"]
STEPS = [
    *("--nodes", "3", "--server-nodes", "1", "--gpus-per-node", "8", "--max-restarts", "2"),
    *("--partition", "big one", "--account", "me", "--time", "12:00:00", "--singleton"),
    *("--container", "/images/it's.sqsh", "--mount", "/a $(b):/c d", "--module", "cuda/13.0"),
    *("--env", f"ODD={ODD}", "--signal-before", "600"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the command is given, with a model and prompts."""
    monkeypatch.chdir(tmp_path)
    write_sound_recipe(tmp_path)
    return tmp_path


def write_sound_recipe(folder: Path) -> None:
    """sound/recipe.yaml, whose paths are relative to ``folder``."""
    write_byte_tokenizer(write_tiny_qwen3(folder / "model", vocab_size=264))
    (folder / "prompts.jsonl").write_text('{"prompt": "2+2?"}\n')
    model = ModelConfig(hf_path="model")
    data = DataConfig(path="prompts.jsonl", max_prompt_length=64)
    recipe = Recipe(student=model, teacher=model, data=data)
    recipe = replace(recipe, prefix=replace(recipe.prefix, max_length=75))
    save_record(recipe, folder / "sound")


HET = [
    *("--nodes", "3", "--server-nodes", "1", "--heterogeneous", "--gpus-per-node", "8"),
    *("--server-gpus-per-node", "4", "--python", "python3"),
]
TEACHER = [
    *("--nodes", "4", "--server-nodes", "1", "--teacher-nodes", "1", "--gpus-per-node", "2"),
    *("--env", "HF_TOKEN", "--python", "python3"),
]
SERVED = "teacher.placement=server"
TEACHER_SERVERS = [
    *("--nodes", "4", "--server-nodes", "1", "--teacher-server-nodes", "2", "--heterogeneous"),
    *("--gpus-per-node", "8", "--server-gpus-per-node", "4", "--python", "python3"),
    SERVED,
]
MANY_NODES = [
    *("--nodes", "2", "--gpus-per-node", "8", "--python", "python3"),
    "rollout.server_urls=[http://a:1]",
]
SHAPES = {
    "one_node": ONE_NODE,
    "many_nodes": MANY_NODES,
    "steps": STEPS,
    "heterogeneous": HET,
    "teacher_nodes": TEACHER,
    "teacher_servers": TEACHER_SERVERS,
}
DRY_RUNS = """\
import json, sys
from megatron_prefix.cli import main
for words in json.loads(sys.argv[1]):
    print("# ==== shape", flush=True)
    if main(words):
        sys.exit(1)
"""


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the dry run of each shape printed; in one process of its own: nemo-run takes seconds to
    import, and keeps its home from then on."""
    folder = tmp_path_factory.mktemp("shapes")
    write_sound_recipe(folder)
    common = ["launch", "sound/recipe.yaml", "run.name=it's a $(run)", "--executor", "slurm"]
    common += ["train.global_batch_size=128", "train.micro_batch_size=1", "--dryrun"]
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUNS, json.dumps([[*common, *w] for w in SHAPES.values()])],
        env={**os.environ, "NEMORUN_HOME": HOME, "HF_TOKEN": "of nobody's concern"},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(folder.rglob("*")) == before, "a dry run writes nothing"
    assert not Path(HOME).exists()
    texts = done.stdout.replace(str(folder), "/FOLDER").split("# ==== shape\n")[1:]
    return dict(zip(SHAPES, texts, strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_a_dry_run_prints_the_scripts(name: str, shapes: dict[str, str]) -> None:
    golden = GOLDEN / f"launch_{name}.sh"
    if not golden.exists():
        golden.write_text(shapes[name])
        pytest.fail(f"{golden} was written anew")
    assert shapes[name] == golden.read_text()


@pytest.mark.parametrize("name", SHAPES)
def test_the_printed_scripts_are_shell(name: str) -> None:
    scripts = (GOLDEN / f"launch_{name}.sh").read_text().split("# ==> ")[1:]
    assert len(scripts) == {"one_node": 2, "many_nodes": 2, "teacher_servers": 4}.get(name, 3)
    for script in scripts:
        body = script.partition("\n")[2]
        done = subprocess.run(["bash", "-n"], input=body, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_only_checked_words_and_numbers_reach_the_batch_script() -> None:
    batch = (GOLDEN / "launch_steps.sh").read_text().split("# ==> ")[1]
    assert batch.count("touch") == 0, "a variable's value"
    steps = [shlex.split(line) for line in batch.splitlines() if line.startswith("srun ")]
    assert len(steps) == 2
    for words in steps:
        assert words[words.index("--container-image") + 1] == "/images/it's.sqsh"
        assert words[words.index("--container-mounts") + 1].startswith("/a $(b):/c d,")
    # The run's name as a folder, which is quoted.
    assert batch.count("$(run)") == batch.count("endpoints='/FOLDER/runs/it'\"'\"'s a $(run)/") == 1


def test_a_steps_script_hands_values_on_as_they_are(tmp_path: Path) -> None:
    here = tmp_path / "a $(touch INJECTED) 'b"
    record = here / "nemo_run $x" / "recipe.yaml"
    record.parent.mkdir(parents=True)
    tool = tmp_path / "tool"
    tool.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ['ODD'], os.getcwd()]))\n"
    )
    tool.chmod(0o755)
    cluster = Cluster(nodes=3, server_nodes=1, env=(("ODD", ODD),), python=str(tool))
    variables = {"run_head": "node1", "run_attempt": "7.0", "run_port": "20007"}
    seen = []
    for script in (trainer_script(cluster, record, here), server_script(cluster, record, here)):
        command = ["bash", "-c", script.replace("/nemo_run", "/replaced by nemo-run")]
        told = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        check, last = map(json.loads, told.stdout.splitlines())
        assert check[0][1:] == ["megatron_prefix.cli", "doctor", "--node", str(record.parent)]
        seen.append(last)
    endpoints = str(record.parent / "endpoints" / "7.0")
    assert seen[0][1:] == seen[1][1:] == [ODD, str(here)]
    assert seen[0][0][:3] == ["-m", "megatron_prefix.agent", str(record)]
    assert seen[0][0][3:] == [
        *("--nodes", "2", "--ranks-per-node", "1", "--max-restarts", "0", "--id", "7.0"),
        *("--rendezvous", "node1:20007", "--endpoints", endpoints, "--endpoint-files", "1"),
    ]
    assert seen[1][0][1:3] == ["megatron_prefix.rollout.serve", str(record)]
    assert seen[1][0][3:] == ["--peer", "node1", "--endpoints-dir", endpoints]
    assert not list(tmp_path.rglob("INJECTED"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes", "2"], "--nodes 2 needs --executor slurm"),
        (["--executor", "slurm", "--nodes", "2"], "give --server-nodes 1"),
        (["--executor", "slurm", "--nodes", "2", "--server-nodes", "2"], "leave one to train on"),
        (["--executor", "slurm", "--heterogeneous"], "needs a group that serves"),
        (["--server-gpus-per-node", "4"], "--server-gpus-per-node 4 needs --heterogeneous"),
        (["--executor", "slurm", "--partition", "a\nb"], "control character"),
        (
            ["--executor", "slurm", "--nodes", "3", "--server-nodes", "1", "--teacher-nodes", "2"],
            "--teacher-nodes 2 of the 2 that train must leave one to the student",
        ),
        (
            [*"--executor slurm --nodes 3 --server-nodes 1 --teacher-server-nodes 1".split()],
            "--teacher-server-nodes 1 is not needed: no teacher has placement=server",
        ),
        (
            ["--executor", "slurm", "--nodes", "2", "--server-nodes", "1", SERVED],
            "teacher.server.urls is empty, and no node of --nodes 2 serves teachers: give",
        ),
        (
            [
                *"--executor slurm --nodes 2 --server-nodes 1 --teacher-server-nodes 1".split(),
                SERVED,
            ],
            "--server-nodes 1 and --teacher-server-nodes 1 of --nodes 2 must leave one to train on",
        ),
        (["--mount", "/a:/b,/c:/d"], "--mount /a:/b,/c:/d: pyxis takes a comma for the next"),
        (["--env", "a b=1"], "is no variable's name"),
        (["--env", "NOT_SET_ANYWHERE"], "no such variable here; give NOT_SET_ANYWHERE=value"),
        (["--gpus-per-node", "3"], "must be a multiple of"),
    ],
)
def test_bad_words_are_told_in_one_line(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "sound/recipe.yaml", *words]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not (folder / "runs").exists()


def test_a_machine_without_slurm_submits_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    words = ["train.global_batch_size=8", "train.micro_batch_size=1", "--detach"]
    assert main(["launch", "sound/recipe.yaml", "--executor", "slurm", *words]) == 2
    assert "there is no sbatch here; give the command on a login node" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_nodes_that_serve_are_refused_where_nothing_is_asked_of_them() -> None:
    cluster = Cluster(executor="slurm", nodes=2, server_nodes=1)
    check_cluster(cluster, Recipe())
    for rollout in (RolloutConfig(replay="old"), RolloutConfig(server_urls=("http://a:1",))):
        with pytest.raises(ValueError, match="--server-nodes 1 is not needed"):
            check_cluster(cluster, Recipe(rollout=rollout))


def test_servers_of_the_evaluations_own_are_counted_over_all_nodes_that_serve() -> None:
    rollout = RolloutConfig(num_servers=2)
    recipe = Recipe(rollout=rollout, eval=EvalConfig(path="held_out", interval=1, own_servers=3))
    check_cluster(Cluster(executor="slurm", nodes=3, server_nodes=2), recipe)
    for cluster in (Cluster(), Cluster(executor="slurm", nodes=2, server_nodes=1)):
        with pytest.raises(ValueError, match=r"own_servers=3 of 2 server\(s\) in all"):
            check_cluster(cluster, recipe)


def test_options_win_over_the_recipes_own_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from megatron_prefix.config import Recipe\n"
        "from megatron_prefix.jobs.cluster import Cluster\n"
        "def recipe():\n    return Recipe()\n"
        "def cluster():\n    return Cluster(executor='slurm', nodes=5, partition='gpu')\n"
    )
    monkeypatch.setenv("HERE", "a b")
    words = ["--nodes", "4", "--env", "HERE", "--env", "X=1=2", "--mount", "/a:/b"]
    arguments = build_parser().parse_args(["launch", str(recipe), *words])
    assert cluster_of(arguments) == Cluster(
        executor="slurm",
        nodes=4,
        partition="gpu",
        env=(("HERE", "a b"), ("X", "1=2")),
        mounts=("/a:/b",),
    )


def test_world_sizes() -> None:
    assert Cluster().world_size == 0, "the recipe's"
    assert Cluster(gpus_per_node=8).world_size == 8
    assert Cluster(nodes=3, server_nodes=1).world_size == 2
    assert Cluster(nodes=3, server_nodes=1, gpus_per_node=8).world_size == 16
    assert Cluster(nodes=3, gpus_per_node=8, ranks_per_node=4).world_size == 12


def test_a_teacher_on_nodes_of_its_own_has_all_their_ranks() -> None:
    cluster = Cluster(executor="slurm", nodes=6, server_nodes=1, teacher_nodes=2, gpus_per_node=8)
    recipe = on_cluster(Recipe(), cluster)
    assert (recipe.run.world_size, recipe.teacher.world_size) == (40, 16)
    assert recipe.teacher.placement == "separate"
    assert on_cluster(Recipe(), Cluster()) == Recipe()
    assert on_cluster(Recipe(), replace(cluster, teacher_nodes=0)).teacher == Recipe().teacher


@pytest.mark.parametrize(("ends", "code"), [("true", 0), ("exit 1", 2), ("sleep 60", 2)])
def test_a_node_that_does_not_pass_its_check_starts_nothing(
    ends: str, code: int, tmp_path: Path
) -> None:
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/bash\nif [[ $3 == doctor ]]; then {ends}; else echo started; fi\n")
    tool.chmod(0o755)
    cluster = Cluster(executor="slurm", nodes=2, python=str(tool))
    script = trainer_script(cluster, tmp_path / "r" / "recipe.yaml", tmp_path)
    assert "timeout -k 10 300 " in script
    variables = {
        "SLURMD_NODENAME": "node7",
        "run_head": "node1",
        "run_attempt": "1",
        "run_port": "2",
    }
    done = subprocess.run(
        ["bash", "-c", script.replace("10 300 ", "10 0.5 ")],
        env=variables, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (code, "" if code else "started\n")
    assert ("node node7 cannot run this" in done.stderr) == bool(code)


@pytest.mark.parametrize("name", ["TERM", "USR1"])
def test_a_signal_during_the_check_ends_with_75(name: str, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/bash\nkill -{name} $(cat {tmp_path}/pid)\n")
    tool.chmod(0o755)
    script = trainer_script(
        Cluster(executor="slurm", nodes=2, python=str(tool)), tmp_path / "r" / "x", tmp_path
    )
    done = subprocess.run(["bash", "-c", f"echo $$ >{tmp_path}/pid\n{script}"])
    assert done.returncode == 75
