"""Servers on a node of their own: how their end and the trainer's bear on the job's."""

import re
from pathlib import Path

import pytest

from megatron_prefix.rollout.records import save_rollouts
from tests.slurm.conftest import STEPS, Job, rollouts
from tests.slurm.freeze import PATIENCE_S, frozen_until_signalled
from tests.slurm.virtual_slurm import VirtualSlurm, wait_until

pytestmark = pytest.mark.slurm
MULTI_NODE = str(Path(__file__).parents[2] / "slurm" / "multi_node.sbatch")


def output_of(job: Job, name: str) -> str:
    return (job.root.parent / f"{name}.out").read_text()


def test_a_heterogeneous_job_is_requeued_whole_and_ends_its_servers_with_its_trainer(
    virtual_slurm: VirtualSlurm, job: Job
) -> None:
    """The rollouts are replayed, so that nothing waits for the servers to answer."""
    groups = ["--nodes=1", ":", "--nodes=1"]
    number = virtual_slurm.sbatch(
        f"--output={job.root.parent}/het.out", *groups, MULTI_NODE, "gsm8k_bytes",
        *job.settings("het"),
    )  # fmt: skip
    wait_until(lambda: len(job.records("het")) >= 3, "3 steps", PATIENCE_S)
    with frozen_until_signalled(virtual_slurm):
        virtual_slurm.run("scancel", "--signal=USR1", str(number))
    virtual_slurm.wait_for_restart(number, 1, PATIENCE_S)
    saved = len(job.records("het"))
    assert virtual_slurm.wait_for_end(number, PATIENCE_S) == "COMPLETED", output_of(job, "het")
    assert [record["step"] for record in job.records("het")] == list(range(1, STEPS + 1))
    events = (job.folder("het") / "events.jsonl").read_text()
    assert 3 <= saved < STEPS and f"resumed after step {saved}" in events
    logs = job.folder("het") / "logs"
    for attempt in (0, 1):
        told = (logs / f"job-{number}.{attempt}" / "servers.out").read_text()
        assert "error" not in told
    assert list((job.folder("het") / "endpoints").iterdir()) == []
    started = (logs / "servers-0" / "server-0.log").read_text()
    assert "--host 10.77.0." in started, "on the address of its own node"


def test_a_teachers_server_has_a_node_of_its_own_and_ends_with_the_trainer(
    virtual_slurm: VirtualSlurm, job: Job
) -> None:
    """The rollouts are replayed: the only server is the teacher's."""
    steps = 3
    settings = {
        "train.steps": steps,
        "teacher.placement": "server",
        "teacher.server.top_k": 16,
        "teacher.server.start_timeout_s": 900,
    }
    number = virtual_slurm.sbatch(
        f"--output={job.root.parent}/taught.out", "--nodes=2", MULTI_NODE, "gsm8k_bytes",
        *job.settings("taught by a step"), *(f"{key}={value}" for key, value in settings.items()),
        SERVER_NODES="0", TEACHER_SERVER_NODES="1",
    )  # fmt: skip
    assert virtual_slurm.wait_for_end(number, 900) == "COMPLETED", output_of(job, "taught")
    records = job.records("taught by a step")
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert all(record["flops"]["teacher"] > 0 and record["loss"] > 0 for record in records)
    logs = job.folder("taught by a step") / "logs"
    assert not (logs / f"job-{number}.0" / "servers.out").exists()
    assert "error" not in (logs / f"job-{number}.0" / "teachers.out").read_text()
    (started,) = logs.glob("teacher-servers-0/server-0.log")
    assert "--host 10.77.0." in started.read_text()
    assert list((job.folder("taught by a step") / "endpoints").iterdir()) == []


def test_servers_do_not_hide_that_the_trainer_failed(virtual_slurm: VirtualSlurm, job: Job) -> None:
    # Fails in the ranks, once there are no more rollouts.
    recorded = job.root / "one step"
    save_rollouts(recorded, 0, rollouts(0))
    number = virtual_slurm.sbatch(
        f"--output={job.root.parent}/failing.out", "--nodes=2", MULTI_NODE, "gsm8k_bytes",
        *job.settings("failing"), f"train.steps={STEPS + 1}", f"rollout.replay={recorded}",
    )  # fmt: skip
    assert virtual_slurm.wait_for_end(number, 900) == "FAILED", output_of(job, "failing")
    assert virtual_slurm.job(number)["ExitCode"] == "1:0"
    assert virtual_slurm.job(number)["Restarts"] == "0", "a failure is not tried again"
    told = (job.folder("failing") / "logs" / f"job-{number}.0" / "trainer.out").read_text()
    assert "no recorded rollouts of step 1" in told


def test_a_server_that_cannot_start_fails_the_job(virtual_slurm: VirtualSlurm, job: Job) -> None:
    number = virtual_slurm.sbatch(
        f"--output={job.root.parent}/no-server.out", "--nodes=2", MULTI_NODE, "gsm8k_bytes",
        *job.settings("no-server", replay=False), "rollout.server_args=[--no-such-option]",
        "rollout.start_timeout_s=1200",
    )  # fmt: skip
    assert virtual_slurm.wait_for_end(number, 900) == "FAILED", output_of(job, "no-server")
    assert virtual_slurm.job(number)["ExitCode"] == "1:0"
    assert "a server ended, see" in output_of(job, "no-server")
    told = (job.folder("no-server") / "logs" / f"job-{number}.0" / "servers.out").read_text()
    assert "no-such-option" in told


def test_a_node_that_cannot_run_the_job_is_named(virtual_slurm: VirtualSlurm, job: Job) -> None:
    """The nodes have a device file for Slurm to count, and no GPU that torch could use."""
    number = virtual_slurm.sbatch(
        f"--output={job.root.parent}/no-gpus.out", "--nodes=2", "--gpus-per-node=1", MULTI_NODE,
        "gsm8k_bytes", *job.settings("no-gpus"), SERVER_NODES="0",
    )  # fmt: skip
    assert virtual_slurm.wait_for_end(number, 900) == "FAILED"
    assert virtual_slurm.job(number)["ExitCode"] == "2:0"
    told = output_of(job, "no-gpus")
    named = set(re.findall(r"error: node (\S+): ", told))
    assert len(named) == 2 and named <= set(virtual_slurm.names)  # which two is Slurm's choice
    assert "0 GPUs that torch can use, 1 wanted" in told
    assert not job.records("no-gpus")


def test_bad_input_is_told_at_once_and_never_tried_again(
    virtual_slurm: VirtualSlurm, job: Job
) -> None:
    number = virtual_slurm.sbatch(
        f"--output={job.root.parent}/bad.out", "--nodes=2", MULTI_NODE, "gsm8k_bytes",
        *job.settings("bad"), "train.stepz=3", SERVER_NODES="0",
    )  # fmt: skip
    assert virtual_slurm.wait_for_end(number, 900) == "FAILED"
    assert virtual_slurm.job(number)["ExitCode"] == "2:0"
    assert "Did you mean 'train.steps'" in output_of(job, "bad")
    assert not job.folder("bad").exists()
