"""One virtual Slurm of three nodes for all of these tests, and a tiny training job for it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.rollout.records import save_rollouts
from megatron_prefix.types import Rollout
from tests.slurm.virtual_slurm import VirtualSlurm, missing
from tests.tiny_models import write_tiny_qwen3

ASSETS = Path(__file__).parents[1] / "assets"
STEPS, BATCH = 30, 8
BYTES = {"vocab_size": 264, "eos_token_id": 261, "bos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="session")
def virtual_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualSlurm]:
    if why := missing():
        pytest.skip(why)
    slurm = VirtualSlurm(tmp_path_factory.mktemp("slurm"), nodes=3)
    try:
        slurm.start()
        yield slurm
    finally:
        slurm.stop()


class Job:
    """Two tiny models and recorded rollouts, in a folder whose name a shell would run."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a $(touch INJECTED) 'b"
        self.student = write_tiny_qwen3(self.root / "student", **BYTES)
        self.teacher = write_tiny_qwen3(self.root / "teacher", seed=1, **BYTES)
        for folder in (self.student, self.teacher):
            write_byte_tokenizer(folder)
            settings = json.loads((folder / "generation_config.json").read_text())
            settings |= {"eos_token_id": 261, "bos_token_id": None, "pad_token_id": None}
            (folder / "generation_config.json").write_text(json.dumps(settings))
        for step in range(STEPS):
            save_rollouts(self.root / "rollouts", step, rollouts(step))

    def settings(self, name: str, *, replay: bool = True) -> list[str]:
        settings = {
            "run.name": name,
            "run.output_dir": self.root / "runs",
            "student.hf_path": self.student,
            "teacher.hf_path": self.teacher,
            "data.path": ASSETS / "gsm8k_8.jsonl",
            "data.max_prompt_length": 400,
            "train.steps": STEPS,
            "train.global_batch_size": BATCH,
            "train.micro_batch_size": 2,
            "prefix.min_length": 3,
            "prefix.max_length": 12,
            "optimizer.lr_warmup_steps": 2,
            "checkpoint.save_interval": 2,
            "checkpoint.export_hf": "false",
            "log.tensorboard": "false",
            "eval.path": "",
            "rollout.device": "cpu",
            "run.distributed_timeout_s": 1200,
        }
        if replay:
            settings["rollout.replay"] = self.root / "rollouts"
        return [f"{key}={value}" for key, value in settings.items()]

    def folder(self, name: str) -> Path:
        return self.root / "runs" / name

    def records(self, name: str) -> list[dict]:
        file = self.folder(name) / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def results(self, name: str) -> list[tuple[int, float, float]]:
        return [(r["step"], r["loss"], r["grad_norm"]) for r in self.records(name)]


def rollouts(seed: int) -> list[Rollout]:
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 256, (length,), generator=generator).tolist())

    return [Rollout(ids(5 + i), ids(3), (0.0,) * 3, "length", 0, i) for i in range(BATCH)]


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("job"))
