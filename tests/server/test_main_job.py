"""The main job on real text, as a user starts it: servers, ranks, signals, resume, replay."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch
import transformers

from megatron_prefix.config import DataConfig, EvalConfig
from megatron_prefix.data.tokenizers import load_tokenizer, write_byte_tokenizer
from megatron_prefix.evaluation.evaluate import evaluate
from megatron_prefix.types import Prompt, Rollout
from tests.server.by_transformers import greedy_rollout
from tests.server.processes import children_of, wait_until
from tests.tiny_models import write_tiny_qwen3

ASSETS = Path(__file__).parents[1] / "assets"
STEPS, LR, ANSWER = 8, 0.005, 32
END = 261
BYTES = {"vocab_size": 264, "eos_token_id": END, "bos_token_id": None, "pad_token_id": None}


def left(marker: str, job: "Job") -> list[str]:
    """What still lives of ``job``: its processes, or its servers."""
    return children_of(marker) + children_of(str(job.student))


class Job:
    """``megatron-prefix train`` on GSM8K with two tiny models, in a folder of its own."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "runs" / "job"
        models = root / "models"
        self.student = write_tiny_qwen3(models / "student", initializer_range=0.05, **BYTES)
        self.teacher = write_tiny_qwen3(
            models / "teacher", seed=1, hidden_size=96, num_hidden_layers=3, **BYTES
        )
        for folder in (self.student, self.teacher):
            write_byte_tokenizer(folder)
            settings = json.loads((folder / "generation_config.json").read_text())
            settings |= {"eos_token_id": END, "bos_token_id": None, "pad_token_id": None}
            (folder / "generation_config.json").write_text(json.dumps(settings))

    def command(self, *overrides: str, name: str = "job") -> list[str]:
        settings = {
            "run.name": name,
            "run.output_dir": self.root / "runs",
            "student.hf_path": self.student,
            "student.tensor_model_parallel_size": 2,
            "teacher.hf_path": self.teacher,
            "teacher.pipeline_model_parallel_size": 2,
            "data.path": ASSETS / "gsm8k_8.jsonl",
            "train.steps": STEPS,
            "train.global_batch_size": 8,
            "train.micro_batch_size": 4,
            "prefix.min_length": 3,
            "prefix.max_length": 12,
            "eval.path": ASSETS / "gsm8k_8.jsonl",
            "eval.interval": 1,
            "eval.max_new_tokens": ANSWER,
            "optimizer.lr": LR,
            "optimizer.lr_warmup_steps": 2,
            "rollout.record": "true",
            "rollout.device": "cpu",
            "rollout.logprob_tolerance": 0.001,
        }
        words = [f"{key}={value}" for key, value in settings.items()]
        return [sys.executable, "-m", "megatron_prefix.cli", "train", "gsm8k_bytes"] + [
            *words,
            *overrides,
        ]

    def records(self, name: str = "job") -> list[dict]:
        file = self.root / "runs" / name / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def run(self, *overrides: str, name: str = "job") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*overrides, name=name), capture_output=True, text=True, timeout=400
        )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def interrupted(job: Job) -> tuple[int, int]:
    """Exit code and steps of a first start that got SIGTERM after its third step."""
    process = subprocess.Popen(
        job.command(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 300
    while len(job.records()) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert len(job.records()) >= 3, output
    return process.returncode, len(job.records())


@pytest.fixture(scope="module")
def resumed(job: Job, interrupted: tuple[int, int]) -> subprocess.CompletedProcess[str]:
    return job.run()


def test_a_signal_saves_and_ends_with_75_and_no_process_is_left(
    job: Job, interrupted: tuple[int, int]
) -> None:
    code, steps = interrupted
    assert code == 75
    assert 3 <= steps < STEPS
    saved = [folder.name for folder in (job.folder / "checkpoints").iterdir()]
    assert saved == [f"step_{steps:08d}"]
    assert children_of(str(job.root)) == []


def test_the_same_command_goes_on_to_the_end(
    job: Job, interrupted: tuple[int, int], resumed: subprocess.CompletedProcess[str]
) -> None:
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"resumed after step {interrupted[1]}" in resumed.stdout + resumed.stderr
    assert [record["step"] for record in job.records()] == list(range(1, STEPS + 1))
    assert children_of(str(job.root)) == []


def test_server_and_trainer_agree_at_every_step(
    job: Job, resumed: subprocess.CompletedProcess[str]
) -> None:
    for record in job.records():
        assert record["logprob_diff_max"] < 1e-3
        assert record["policy_lag"] == 0
        assert record["policy_version"] == record["step"] - 1
    assert "checksums agree" in resumed.stdout + resumed.stderr


def test_the_prefix_length_follows_its_schedule_through_sampler_mask_and_log(
    job: Job, resumed: subprocess.CompletedProcess[str]
) -> None:
    lengths = [record["prefix_length"] for record in job.records()]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (3, 12)
    for record in job.records():
        assert len(record["kl_by_position"]) == record["prefix_length"]
        assert record["prefix_tokens"] <= 8 * record["prefix_length"]
        assert record["flops"]["student"] < record["flops_full"]["student"] or (
            record["prefix_length"] == 12
        )


def test_the_ledger_of_a_resumed_run_is_the_sum_of_its_lines(
    job: Job, resumed: subprocess.CompletedProcess[str]
) -> None:
    saved = job.folder / "checkpoints" / f"step_{STEPS:08d}" / "run_state.json"
    ledger = json.loads(saved.read_text())["conductor"]["ledger"]
    written = json.loads((job.folder / "ledger.json").read_text())
    for part in ("rollout", "teacher", "student"):
        summed = sum(record["flops"][part] for record in job.records())
        assert summed == ledger[part] == written["flops"][part] > 0
        full = sum(record["flops_full"][part] for record in job.records())
        assert full == ledger[f"full_{part}"] == written["flops_full"][part]
    assert written["ratio"] == pytest.approx(
        sum(written["flops"].values()) / sum(written["flops_full"].values())
    )


def test_an_evaluation_by_the_rollouts_servers_is_that_of_the_exported_step(
    job: Job,
    interrupted: tuple[int, int],
    resumed: subprocess.CompletedProcess[str],
    tmp_path: Path,
) -> None:
    """Of the step at which the run was stopped, answered by transformers, greedily."""
    step, tool = interrupted[1], ASSETS.parents[1] / "tools" / "convert_megatron_to_hf.py"
    checkpoint, export = job.folder / "checkpoints" / f"step_{step:08d}", tmp_path / "hf"
    subprocess.run(
        [sys.executable, tool, "--checkpoint", checkpoint, "--output", export], check=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)

    def answered(prompts: Sequence[Prompt], most: int) -> list[Rollout]:
        return [greedy_rollout(model, prompt, most, END) for prompt in prompts]

    config = EvalConfig(str(ASSETS / "gsm8k_8.jsonl"), prompt_column="question")
    offline = evaluate(
        replace(config, max_new_tokens=ANSWER),
        load_tokenizer(str(export)),
        answered,
        DataConfig(max_prompt_length=384),
    )
    before, inside = (
        [json.loads(line) for line in (job.folder / f"evaluations/step_{n:08d}.jsonl").open()]
        for n in (0, step)
    )
    assert inside == [asdict(sample) for sample in offline.samples] != before
    lines = [json.loads(line) for line in (job.folder / "evaluations.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert lines[step]["accuracy"] == offline.accuracy
    assert lines[step]["truncated"] == offline.truncated


def test_replayed_without_interruption_it_is_the_same_run_to_the_last_bit(
    job: Job, resumed: subprocess.CompletedProcess[str]
) -> None:
    recorded = job.folder / "rollouts"
    result = job.run(f"rollout.replay={recorded}", "rollout.record=false", name="replayed")
    assert result.returncode == 0, result.stdout + result.stderr
    for live, replayed in zip(job.records(), job.records("replayed"), strict=True):
        for key in ("loss", "grad_norm", "lr", "kl_by_position", "prefix_tokens", "flops"):
            assert live[key] == replayed[key], (live["step"], key)


def hold_a_save(process: subprocess.Popen[bytes], folder: Path) -> int:
    """The step of a save, not the first one, of which rank 0's shard is on the disk and rank 1's
    writer cannot end: it finds a pipe in its shard's place, and waits for a reader."""

    def held() -> list[Path]:
        return [path for path in folder.glob("*.partial") if (path / "__1_0.distcp").is_fifo()]

    while process.poll() is None and not held():
        for partial in folder.glob("*.partial"):
            if partial.stem != "step_00000002":
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    os.mkfifo(partial / "__1_0.distcp")
        time.sleep(0.001)
    (partial,) = held()
    shard = partial / "__0_0.distcp"
    assert wait_until(lambda: shard.exists() and shard.stat().st_size > 0, 60)
    assert not (partial / ".metadata").exists()
    return int(partial.stem.removeprefix("step_"))


def test_a_rank_killed_within_a_save_costs_the_steps_since_the_save_before(
    job: Job, resumed: subprocess.CompletedProcess[str]
) -> None:
    replay = (f"rollout.replay={job.folder / 'rollouts'}", "rollout.record=false")
    saves = ("checkpoint.save_interval=2", "run.max_restarts=1", "train.steps=8")
    output, folder = job.root / "killed-output", job.root / "runs" / "killed"
    with output.open("w") as file:
        command = job.command(*replay, *saves, name="killed")
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        half = hold_a_save(process, folder / "checkpoints")
        assert wait_until(lambda: len(job.records("killed")) > half, 60), "steps wait for the save"
        ranks = psutil.Process(process.pid).children()
        (rank,) = [each for each in ranks if each.environ().get("RANK") == "1"]
        writers = rank.children()
        rank.kill()
        assert process.wait(300) == 0, output.read_text()
    finally:
        process.kill()
    told = output.read_text()
    assert writers and not any(writer.is_running() for writer in writers)
    assert f"checkpoint step_{half:08d} was not whole when the run ended: not used" in told
    assert f"resumed after step {half - 2} from step_{half - 2:08d}" in told
    assert sorted(path.name for path in (folder / "checkpoints").iterdir())[-1] == "step_00000008"
    assert not list(folder.glob("checkpoints/*.partial"))
    for live, again in zip(job.records(), job.records("killed"), strict=True):
        for key in ("step", "loss", "grad_norm", "lr", "kl_by_position", "prefix_tokens"):
            assert live[key] == again[key], (live["step"], key)


def test_what_was_trained_is_exported_and_loads(
    job: Job, resumed: subprocess.CompletedProcess[str]
) -> None:
    before = transformers.AutoModelForCausalLM.from_pretrained(job.student).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(job.folder / "hf").state_dict()
    assert sorted(before) == sorted(after)
    assert any(not before[name].equal(after[name]) for name in before)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job.folder / "hf")
    assert tokenizer.decode(tokenizer.encode("2+2", add_special_tokens=False)) == "2+2"


def test_killed_outright_its_ranks_leave_nothing(
    job: Job, resumed: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    marker = str(tmp_path)
    process = subprocess.Popen(
        job.command(
            f"run.output_dir={tmp_path}",
            f"rollout.replay={job.folder / 'rollouts'}",
            "checkpoint.save_interval=1",
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    # Replayed, so that a save (which forks a process for its results) comes within seconds.
    assert wait_until(lambda: (tmp_path / "job" / "checkpoints").exists())
    assert len(children_of(f"megatron_prefix.worker {marker}")) >= 2
    process.kill()
    process.wait()
    wait_until(lambda: not left(marker, job))
    assert not left(marker, job)


def test_a_run_folder_of_another_recipe_is_refused(
    job: Job, resumed: subprocess.CompletedProcess[str]
) -> None:
    result = job.run("optimizer.lr=0.5")
    assert result.returncode == 2
    assert "optimizer.lr" in result.stderr
    assert "0.5" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_non_finite_steps_are_skipped_counted_and_end_the_run(
    job: Job, resumed: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    broken = transformers.AutoModelForCausalLM.from_pretrained(job.student)
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(tmp_path)
    write_byte_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 261}')
    result = job.run(
        f"student.hf_path={tmp_path}",
        f"rollout.replay={job.folder / 'rollouts'}",
        "train.max_skipped_steps=3",
        name="broken",
    )
    assert result.returncode == 1
    assert "3 steps in a row had a non-finite loss" in result.stdout + result.stderr
    assert [record["skipped"] for record in job.records("broken")] == [True] * 3
