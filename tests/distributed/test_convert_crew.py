"""Conversions that torchrun's processes share, and the files that every conversion writes."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from megatron_prefix.mcore.checked_files import Behind, CheckedFile, Scratch
from megatron_prefix.mcore.contents import check_manifest, read_step
from megatron_prefix.mcore.conversion import Conversion
from megatron_prefix.mcore.convert_to_hf import megatron_to_hf
from megatron_prefix.mcore.convert_to_megatron import STEP_FOLDER, hf_to_megatron
from megatron_prefix.mcore.crew import Crew
from megatron_prefix.mcore.dist_files import DistFile
from megatron_prefix.mcore.hf_map import read_hf_model
from tests.distributed.ranks import run_ranks
from tests.distributed.test_convert import check_equal, tensors, to_megatron
from tests.tiny_models import write_tiny_gpt_oss, write_tiny_qwen3

NAN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_qwen3(tmp_path / "model", vocab_size=265)


def there_and_back(folder: Path) -> tuple[int, list[int], list[str]]:
    """Files of the checkpoint, this rank's progress, and what it is told of a model with a NaN."""
    crew, sizes, told = Crew(dist.get_rank(), dist.get_world_size()), [], []
    job = Conversion(
        read_hf_model(str(folder / "model")),
        folder / "megatron",
        "fp32",
        shard_bytes=40_000,
        crew=crew,
    )
    hf_to_megatron(job, sizes.append)
    step = folder / "megatron" / STEP_FOLDER
    megatron_to_hf(replace(job, output=folder / "back"), read_step(step), sizes.append)
    bad = replace(job, hf=read_hf_model(str(folder / "bad")), output=folder / "never")
    try:
        hf_to_megatron(bad, sizes.append)
    except ValueError as error:
        told.append(str(error))
    return len(job.files), sizes, told


def test_ranks_share_the_files_and_the_errors(model: Path, tmp_path: Path) -> None:
    held = load_file(model / "model.safetensors")
    held[NAN][0, 0] = float("nan")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_bytes((model / "config.json").read_bytes())
    save_file(held, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    answers = run_ranks(2, there_and_back, tmp_path)
    step = tmp_path / "megatron" / STEP_FOLDER
    assert len(list(step.glob("*.distcp"))) == answers[0][0] > 2
    assert check_manifest(step) == len(list(step.iterdir())) - 1
    check_equal(tensors(model), tensors(tmp_path / "back"))
    assert all(sizes for _, sizes, _ in answers)
    assert all(told == [f"values that are not finite in 1 tensors: {NAN}"] for *_, told in answers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "bad", "megatron", "model"]


def test_a_tool_runs_under_torchrun(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="convert",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",  # what torchrun starts afresh is here by then
        monitor_interval=0.1,
    )
    torchrun = elastic_launch(config, to_megatron)
    assert torchrun(model, tmp_path / "out") == {0: 0, 1: 0}
    assert capfd.readouterr().out.count("wrote ") == 1
    assert check_manifest(tmp_path / "out" / STEP_FOLDER) == 4
    assert torchrun(model, tmp_path / "out") == {0: 2, 1: 2}
    assert capfd.readouterr().err.count("out is there already") == 1
    assert torchrun(model, tmp_path / "other", "--ranks", 2) == {0: 2, 1: 2}
    assert capfd.readouterr().err.count("--ranks 2 under torchrun with 2 processes") == 1
    unlike = elastic_launch(config, seen_by_the_first_alone)
    assert unlike(model, tmp_path / "other") == {0: 2, 1: 2}
    assert capfd.readouterr().err.count("other-1 is no folder") == 1


def seen_by_the_first_alone(model: Path, output: Path) -> int:
    """A model that the second rank, on another machine, does not see."""
    rank = int(os.environ["RANK"])
    return to_megatron(model if rank == 0 else Path(f"{output}-{rank}"), output)


def layered(folder: Path, output: Path, **settings: Any) -> Conversion:
    """A model of 16 layers, each of which has two large tensors."""
    path = write_tiny_qwen3(folder, vocab_size=265, num_hidden_layers=16)
    return Conversion(read_hf_model(str(path)), output, "bf16", ranks=0, **settings)


def test_files_are_of_like_size_and_processes_share_them_evenly(tmp_path: Path) -> None:
    job = layered(tmp_path / "model", tmp_path, shard_bytes=100_000)
    sizes = [sum(map(job.bytes_of, units)) for units in job.files]
    assert len(sizes) == 16 and sum(sizes) == job.bytes > 8 * 100_000
    assert max(sizes) < 1.5 * min(sizes)
    assert [unit for units in job.files for unit in units] == list(job.hf.units)
    (one,) = layered(tmp_path / "model", tmp_path).files
    assert len(one) == len(job.hf.units)


@pytest.mark.parametrize("of_all", [1.9, 2.1, 7.9, 8.0, 8.1, 12.0])
def test_eight_processes_have_the_same_to_do_whatever_the_size(
    tmp_path: Path, of_all: float
) -> None:
    job = layered(tmp_path / "model", tmp_path)
    job = replace(job, shard_bytes=int(job.bytes / of_all))
    assert len(job.files) % 8 == 0
    assert max(sum(map(job.bytes_of, units)) for units in job.files) <= job.shard_bytes


def test_a_stack_of_experts_is_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    hf = read_hf_model(str(write_tiny_gpt_oss(tmp_path / "model")))
    job = Conversion(hf, tmp_path, "bf16", ranks=0)
    largest = max(job.bytes_of(unit) * (unit.stacked or 1) for unit in hf.units)
    job = replace(job, shard_bytes=largest)
    assert len(job.files) > 1 and job.processes == 1


@pytest.mark.parametrize(
    ("cores", "shard_bytes", "processes"),
    [(1, 400_000, 1), (3, 400_000, 3), (64, 400_000, 8), (64, 100_000, 3), (64, 4 * 2**30, 1)],
    ids=["one core", "cores", "eight", "room", "one file"],
)
def test_processes_are_as_many_as_cores_files_and_memory_allow(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    shard_bytes: int,
    processes: int,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    job = layered(tmp_path / "model", tmp_path, shard_bytes=shard_bytes)
    assert job.processes == processes
    assert replace(job, crew=Crew(0, 2)).processes == 1


def test_a_file_that_does_not_keep_its_bytes_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="/dev/null reads back otherwise"):
        with CheckedFile(Path("/dev/null")) as file:
            file.write(b"gone")


def test_a_files_bytes_are_those_written_and_told(tmp_path: Path) -> None:
    data = torch.randint(256, (5 * 2**20 + 13,), dtype=torch.uint8).numpy().tobytes()
    path = tmp_path / "file"
    told = bytearray()
    with CheckedFile(path, told.extend) as file:
        for start, stop in ((0, 3), (3, 2**20 + 7), (2**20 + 7, 2**20 + 9), (2**20 + 9, None)):
            file.write(data[start:stop])
            file.flush()
    assert path.read_bytes() == data
    assert told == data


def test_after_an_error_a_data_file_is_closed(tmp_path: Path) -> None:
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="of the unit after"), DistFile(tmp_path / "file") as file:
        file.add_common()
        assert len(os.listdir("/proc/self/fd")) > files
        raise ValueError("of the unit after")
    assert len(os.listdir("/proc/self/fd")) == files


def test_scratch_is_one_owners_until_it_is_cleared() -> None:
    scratch = Scratch()
    first = scratch.take(100).fill_(1)
    second = scratch.take(1000).fill_(2)
    third = scratch.take(10).fill_(3)
    assert [int(part.sum()) for part in (first, second, third)] == [100, 2000, 30]
    scratch.clear()
    again = scratch.take(1000)
    scratch.clear()
    assert scratch.take(1000).data_ptr() == again.data_ptr()


def test_an_error_behind_is_raised_by_the_next_call() -> None:
    def fail() -> None:
        raise OSError("full")

    done: list[int] = []
    with pytest.raises(OSError, match="full"), Behind() as behind:
        behind.submit(done.append, 1)
        behind.submit(fail)
        behind.submit(done.append, 2)
    assert done == [1]
    with pytest.raises(OSError, match="full"), Behind() as behind:
        behind.submit(fail)
