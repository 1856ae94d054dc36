"""``megatron-prefix launch`` through the real nemo-run, on the virtual Slurm."""

import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prefix.recipe import load_record
from tests.slurm.conftest import STEPS, Job
from tests.slurm.freeze import PATIENCE_S, frozen_until_signalled
from tests.slurm.virtual_slurm import VirtualSlurm, wait_until

pytestmark = pytest.mark.slurm
ODD = 'it\'s  "$(touch INJECTED)" `touch INJECTED` $HOME $$ \\'


SECRET = 'a "secret" of $(ours)'


class Launched:
    """A ``megatron-prefix launch`` that is under way beside the controller."""

    def __init__(self, slurm: VirtualSlurm, job: Job, *words: str) -> None:
        self.home = job.root.parent / "nemo"
        self._process = slurm.popen(
            *(sys.executable, "-m", "megatron_prefix.cli", "launch", "gsm8k_bytes"),
            *("--executor", "slurm", "--ranks-per-node", "1", *words),
            NEMORUN_HOME=str(self.home),
            OF_OURS=SECRET,
        )

    def running(self) -> bool:
        return self._process.poll() is None

    def end(self) -> tuple[int, str]:
        output, errors = self._process.communicate(timeout=PATIENCE_S)
        return self._process.returncode, output + errors

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def wait_for_servers(launched: Launched, folder: Path, name: str = "servers") -> Path:
    """The file that the first node of those that serve leaves once its servers answer."""
    found: list[Path] = []

    def there() -> bool:
        found[:] = folder.glob(f"endpoints/*/{name}-0.json")
        return bool(found) or not launched.running()

    wait_until(there, name, PATIENCE_S)
    assert found, launched.end()
    return found[0]


def assert_nothing_runs(slurm: VirtualSlurm) -> None:
    """On no node anything of ours, once all are idle."""
    wait_until(lambda: slurm.idle_nodes() == slurm.names, "idle nodes")
    left = [c for name in slurm.names for c in commands_on(slurm, name).values()]
    assert not [command for command in left if "megatron_prefix" in command or "sglang" in command]


def commands_on(slurm: VirtualSlurm, node: str) -> dict[int, str]:
    found = {}
    for pid in slurm.pids(node):
        try:
            found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile
            continue
    return found


def listening(pid: int) -> Iterator[str]:
    """Hexadecimal addresses that a process listens on, in its own network."""
    try:
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        rows = [
            line.split()
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        ]
    except OSError:  # it ended meanwhile
        return
    for row in rows:
        if row[3] == "0A" and f"socket:[{row[9]}]" in links:
            yield row[1].partition(":")[0]


@pytest.fixture(scope="module")
def served(virtual_slurm: VirtualSlurm, job: Job) -> Iterator[tuple[Launched, Path]]:
    """A student on one node, its teacher on another, a real SGLang on a third, in a group of its
    own."""
    settings = [*job.settings("served", replay=False), "train.steps=3"]
    words = ["--nodes", "3", "--server-nodes", "1", "--heterogeneous", "--teacher-nodes", "1"]
    words += ["--env", f"ODD={ODD}", "--env", "A_KEY=${oc.env:OF_OURS}", *settings]
    launched = Launched(virtual_slurm, job, *words, "rollout.start_timeout_s=1200")
    try:
        yield launched, wait_for_servers(launched, job.folder("served"))
    finally:
        launched.stop()


def test_servers_are_reached_by_the_nodes_address_and_a_key_of_the_run(
    virtual_slurm: VirtualSlurm, job: Job, served: tuple[Launched, Path]
) -> None:
    file = served[1]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (endpoint,) = json.loads(file.read_text())
    assert endpoint["url"].startswith("http://10.77.0.3:")
    assert_secret(virtual_slurm, job, served[0], endpoint["api_key"], file)


def assert_secret(
    slurm: VirtualSlurm, job: Job, launched: Launched, secret: str, *holders: Path
) -> None:
    """On no command line of any node's, and in no file but ``holders``."""
    commands = [c for name in slurm.names for c in commands_on(slurm, name).values()]
    assert any("rollout.serve" in command for command in commands)
    assert any("megatron_prefix.agent" in command for command in commands)
    assert not [command for command in commands if secret in command]
    folders = (job.folder("served"), launched.home, slurm.root / "spool")
    texts = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert job.folder("served") / "recipe.yaml" in texts
    assert [path for path in texts if secret.encode() in path.read_bytes()] == list(holders)


def test_servers_listen_on_loopback_and_the_nodes_address_alone(
    virtual_slurm: VirtualSlurm, served: tuple[Launched, Path]
) -> None:
    servers = [p for p, c in commands_on(virtual_slurm, "node3").items() if "sglang" in c]
    found = {address for pid in servers for address in listening(pid)}
    assert "03004D0A" in found, "10.77.0.3"
    assert found <= {"03004D0A", "0100007F"}


def test_a_variable_arrives_as_it_is(
    virtual_slurm: VirtualSlurm, served: tuple[Launched, Path]
) -> None:
    (pid,) = [
        pid
        for pid, command in commands_on(virtual_slurm, "node3").items()
        if "-m megatron_prefix.rollout.serve" in command and "bash" not in command.split()[0]
        if not command.startswith("srun")
    ]
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert f"ODD={ODD}".encode() in environment
    assert f"A_KEY={SECRET}".encode() in environment, "what the reference refers to"


def test_the_teacher_has_a_node_of_its_own(
    virtual_slurm: VirtualSlurm, job: Job, served: tuple[Launched, Path]
) -> None:
    logs = [job.folder("served") / "logs" / f"rank_{rank}.log" for rank in (0, 1)]
    wait_until(lambda: all(log.exists() for log in logs), "two ranks", PATIENCE_S)
    nodes = [
        name
        for name in virtual_slurm.names
        if any("multiprocessing.spawn" in c for c in commands_on(virtual_slurm, name).values())
    ]
    assert nodes == ["node1", "node2"]
    recipe = load_record(job.folder("served") / "recipe.yaml")
    assert (recipe.run.world_size, recipe.teacher.world_size) == (2, 1)
    assert recipe.teacher.placement == "separate"


def test_a_secret_of_the_environment_is_nowhere_else(
    virtual_slurm: VirtualSlurm, job: Job, served: tuple[Launched, Path]
) -> None:
    assert (virtual_slurm.root / "spool").is_dir()
    assert_secret(virtual_slurm, job, served[0], SECRET)


def test_the_run_ends_well_and_leaves_nothing_running(
    virtual_slurm: VirtualSlurm, job: Job, served: tuple[Launched, Path]
) -> None:
    code, output = served[0].end()
    assert code == 0, output
    records = job.records("served")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert max(record["logprob_diff_max"] for record in records) < 1e-3
    assert not (job.folder("served") / "endpoints").exists()
    assert_nothing_runs(virtual_slurm)
    assert not [path for folder in (Path.cwd(), job.root) for path in folder.rglob("INJECTED")]


def test_each_step_is_refused_by_a_node_that_cannot_run_it(
    virtual_slurm: VirtualSlurm, job: Job
) -> None:
    """The nodes have a device file for Slurm to count, and no GPU that torch could use."""
    words = ["--nodes", "2", "--server-nodes", "1", "--gpus-per-node", "1"]
    launched = Launched(virtual_slurm, job, *words, *job.settings("refused", replay=False))
    code, output = launched.end()
    assert code == 1, output
    logs = sorted(launched.home.glob("experiments/refused/*/*/log-*.out"))
    assert len(logs) == 2, "a step each"
    for node, log in zip(virtual_slurm.names, logs, strict=False):
        assert "0 GPUs that torch can use, 1 wanted" in log.read_text()
        assert f"0: node {node} cannot run this: see above" in log.read_text()
    assert not job.records("refused")


def test_a_job_that_slurm_does_not_take_is_told_in_one_line(
    virtual_slurm: VirtualSlurm, job: Job
) -> None:
    words = ["--detach", "--nodes", "2", "--partition", "no such", *job.settings("nowhere")]
    code, output = Launched(virtual_slurm, job, *words).end()
    assert code == 2
    (told,) = [line for line in output.splitlines() if line.startswith("megatron-prefix: error: ")]
    assert "the job was not taken: sbatch: error: invalid partition specified: no such" in told


def test_a_job_that_has_ended_since_the_queue_was_asked_needs_no_cancelling(
    virtual_slurm: VirtualSlurm,
) -> None:
    """Slurm takes no word to it any more, and says so with an error."""
    number = virtual_slurm.sbatch("--output=/dev/null", "--wrap=true")
    assert virtual_slurm.wait_for_end(number) == "COMPLETED"
    asked_before = (
        "from megatron_prefix.jobs.cancel import Patience, _end_job; "
        "from megatron_prefix.jobs.slurm_queue import JobState; "
        f"print(_end_job(JobState({number}, 'RUNNING'), Patience(9.0), print))"
    )
    told = virtual_slurm.run(sys.executable, "-c", asked_before)
    assert told.splitlines() == [f"job {number}: ended by itself", "True"]


def ask_later(slurm: VirtualSlurm, *words: str) -> "subprocess.Popen[str]":
    return slurm.popen(sys.executable, "-m", "megatron_prefix.cli", *words)


def ask(slurm: VirtualSlurm, *words: str) -> str:
    return slurm.run(sys.executable, "-m", "megatron_prefix.cli", *words)


def check_cancelled(slurm: VirtualSlurm, job: Job, number: int, before: dict, told: str) -> None:
    """``before``: what status said; ``told``: what cancel said."""
    assert (before["active"], before["attempts"]) == (True, 2)
    assert before["starts"][0]["name"] == f"job {number}"
    assert before["starts"][0]["state"] == "RUNNING"
    assert 0 < before["step"] < before["steps"] == STEPS
    steps = [record["step"] for record in job.records("detached")]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) < STEPS
    assert f"step {len(steps)} is saved: run the same command again to resume" in told
    assert slurm.wait_for_end(number, PATIENCE_S) == "FAILED"
    assert (slurm.job(number)["ExitCode"], slurm.job(number)["Restarts"]) == ("75:0", "1")


def test_a_detached_run_is_requeued_after_a_signal_and_saved_when_it_is_cancelled(
    virtual_slurm: VirtualSlurm, job: Job
) -> None:
    launched = Launched(virtual_slurm, job, "--detach", "--nodes", "2", *job.settings("detached"))
    code, output = launched.end()
    assert code == 0, output
    (number,) = map(int, virtual_slurm.run("squeue", "--noheader", "--format=%i").split())
    wait_until(lambda: len(job.records("detached")) >= 3, "3 steps", PATIENCE_S)
    with frozen_until_signalled(virtual_slurm):
        virtual_slurm.run("scancel", "--signal=USR1", str(number))
    virtual_slurm.wait_for_restart(number, 1, PATIENCE_S)
    done = len(job.records("detached"))
    wait_until(lambda: len(job.records("detached")) >= done + 3, "3 more steps", PATIENCE_S)
    with frozen_until_signalled(virtual_slurm):
        (state,) = json.loads(ask(virtual_slurm, "status", str(job.folder("detached")), "--json"))
        ending = ask_later(virtual_slurm, "cancel", str(job.folder("detached")))
    told, errors = ending.communicate(timeout=PATIENCE_S)
    assert ending.returncode == 0, told + errors
    check_cancelled(virtual_slurm, job, number, state, told)
    follow = ask(virtual_slurm, "logs", str(job.folder("detached")), "--follow", "-n", "0")
    assert "0: step" in follow, "the newest attempt's"
    listed = ask(virtual_slurm, "logs", str(job.folder("detached")), "--list")
    assert [line.split()[0] for line in listed.splitlines()] == [f"{number}.0", f"{number}.1"]
    logs = sorted(path.name for path in launched.home.rglob(f"log-*_{number}_*.out"))
    assert [name.rpartition("_")[2] for name in logs] == ["0.out", "1.out"]
    (script,) = launched.home.rglob("detached_sbatch.sh")
    assert re.search(r"^#SBATCH --signal=USR1@300$", script.read_text(), flags=re.MULTILINE)
    subprocess.run(["bash", "-n", str(script)], check=True)
