"""A teacher's rank that is killed ends the whole run, through the command, with one clear error."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.rollout.records import rollout_file, save_rollouts
from megatron_prefix.run_files.jsonl import METRICS
from tests.distributed.world import LONGEST_PREFIX, rollouts
from tests.tiny_models import write_tiny_qwen3

STEPS = 5000  # far more than are taken
TEACHER = 1  # the rank behind the student's one
SET_TIME_S = 40.0  # the launcher gives the others 20 s to end by themselves


def prepared(folder: Path) -> list[str]:
    """Settings of a run on recorded rollouts: no server is needed."""
    for name, seed in (("student", 0), ("teacher", 1)):
        write_tiny_qwen3(folder / name, seed=seed, vocab_size=264)
        write_byte_tokenizer(folder / name)
    first = save_rollouts(folder / "rollouts", 0, rollouts(vocab=264))
    for step in range(1, STEPS):
        os.link(first, rollout_file(folder / "rollouts", step))
    recipe = folder / "recipe.py"
    recipe.write_text(
        "from megatron_prefix.config import Recipe\n\n\ndef recipe() -> Recipe:\n"
        "    return Recipe()\n"
    )
    return [
        str(recipe),
        "run.name=killed",
        f"run.output_dir={folder}",
        f"student.hf_path={folder / 'student'}",
        f"teacher.hf_path={folder / 'teacher'}",
        "student.params_dtype=fp32",
        "teacher.params_dtype=fp32",
        "teacher.placement=separate",
        "data.max_prompt_length=64",
        "prefix.policy=fixed",
        f"prefix.max_length={LONGEST_PREFIX}",
        f"prefix.min_length={LONGEST_PREFIX}",
        f"rollout.replay={folder / 'rollouts'}",
        f"train.steps={STEPS}",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "log.tensorboard=false",
        "run.max_restarts=0",
    ]


def ranks_of(launcher: int) -> dict[int, int]:
    """Process ids of a launcher's ranks, by rank."""
    found = {}
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in map(int, children):
        lines = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(line[5:]): child for line in lines if line.startswith(b"RANK=")}
    return found


def await_steps(metrics: Path, run: subprocess.Popen[str], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_teacher_ends_all_ranks_with_one_error(tmp_path: Path) -> None:
    settings = prepared(tmp_path)
    run = subprocess.Popen(
        [sys.executable, "-m", "megatron_prefix.cli", "train", *settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        await_steps(tmp_path / "killed" / METRICS, run)
        ranks = ranks_of(run.pid)
        assert sorted(ranks) == [0, TEACHER]
        os.kill(ranks[TEACHER], signal.SIGKILL)
        _, told = run.communicate(timeout=SET_TIME_S)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == 1
    assert f"error: rank {TEACHER}, of the teacher, ended with exit code -9" in told
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    # Rank 0 ended by itself, wherever it was: waiting for hidden states, or giving an order.
    assert " ERROR " in (tmp_path / "killed" / "logs" / "rank_0.log").read_text()
