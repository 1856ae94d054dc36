"""One job that starts both: the servers of the rollouts on a node, the teacher's on another. By its
name before the tests that kill a node: it wants all three."""

import json
import stat
from collections.abc import Iterator

import pytest

from tests.slurm.conftest import Job
from tests.slurm.test_launch import (
    Launched,
    assert_nothing_runs,
    commands_on,
    wait_for_servers,
)
from tests.slurm.virtual_slurm import VirtualSlurm

pytestmark = pytest.mark.slurm
STEPS, NAME = 3, "taught"


@pytest.fixture(scope="module")
def taught(virtual_slurm: VirtualSlurm, job: Job) -> Iterator[Launched]:
    settings = {
        "train.steps": STEPS,
        "teacher.placement": "server",
        "teacher.server.top_k": 16,
        "teacher.server.start_timeout_s": 900,
        "rollout.start_timeout_s": 900,
    }
    words = ["--nodes", "3", "--server-nodes", "1", "--teacher-server-nodes", "1"]
    words += job.settings(NAME, replay=False)
    launched = Launched(virtual_slurm, job, *words, *(f"{k}={v}" for k, v in settings.items()))
    try:
        yield launched
    finally:
        launched.stop()


def test_a_teachers_servers_have_a_node_and_a_key_of_their_own(
    virtual_slurm: VirtualSlurm, job: Job, taught: Launched
) -> None:
    files = [wait_for_servers(taught, job.folder(NAME), name) for name in ("servers", "teacher")]
    (sampling,), (teaching,) = (json.loads(file.read_text()) for file in files)
    assert sampling["url"].startswith("http://10.77.0.2:")
    assert teaching["url"].startswith("http://10.77.0.3:")
    assert sampling["api_key"] != teaching["api_key"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    commands = commands_on(virtual_slurm, "node3").values()
    assert any("megatron_prefix.teachers.serve" in command for command in commands)
    assert not any("megatron_prefix.rollout.serve " in command for command in commands)
    assert not any(teaching["api_key"] in command for command in commands)


def test_the_student_is_taught_and_all_servers_end_with_it(
    virtual_slurm: VirtualSlurm, job: Job, taught: Launched
) -> None:
    code, output = taught.end()
    assert code == 0, output
    records = job.records(NAME)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(record["flops"]["teacher"] > 0 and record["loss"] > 0 for record in records)
    assert not (job.folder(NAME) / "endpoints").exists()
    assert_nothing_runs(virtual_slurm)
