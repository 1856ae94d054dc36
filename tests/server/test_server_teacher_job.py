"""A whole run on a teacher's top k: its server is started, the student learns from it, and nothing
is left of either."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_prefix.tasks import sort_chain
from tests.server.processes import children_of

STEPS = 40
SETTINGS = {
    "run.name": "job",
    "mode.name": "off_policy",  # so that no server samples
    "prefix.policy": "fixed",
    "train.steps": STEPS,
    "teacher.placement": "server",
    "teacher.pipeline_model_parallel_size": 1,
    "teacher.num_layers_in_first_pipeline_stage": 0,
    "teacher.server.top_k": 16,
    "teacher.server.retries": 1,
    "eval.path": "",
    "checkpoint.export_hf": "false",
    "log.tensorboard": "false",
    "log.log_interval": 1,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    rows = [
        {"prompt": problem.prompt, "answer": list(sort_chain.encode(problem.response))}
        for problem in sort_chain.make_problems(256, seed=5)
    ]
    (root / "written.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def records(root: Path) -> list[dict]:
    file = root / "runs" / "job" / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def test_the_student_learns_from_the_servers_top_k(root: Path) -> None:
    settings = SETTINGS | {"run.output_dir": root / "runs", "data.path": root / "written.jsonl"}
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "megatron_prefix.cli", "train", "quickstart", *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    assert said.count("starting an SGLang server of teacher at") == said.count("starting an") == 1
    found = records(root)
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    losses = [record["loss"] for record in found]
    assert statistics.fmean(losses[-5:]) < 0.7 * statistics.fmean(losses[:5])
    assert all(record["flops"]["teacher"] > 0 for record in found)
    assert children_of(str(root)) == []
