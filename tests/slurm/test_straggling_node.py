"""A node of two on which the rank hardly comes to run is named while the job goes on."""

import re
from pathlib import Path

import psutil
import pytest

from megatron_prefix.rollout.records import save_rollouts
from megatron_prefix.run_files.jsonl import EVENTS, read_records
from tests.crowd import crowded
from tests.slurm.conftest import Job, rollouts
from tests.slurm.freeze import PATIENCE_S, rank_pids
from tests.slurm.virtual_slurm import VirtualSlurm, wait_until

pytestmark = pytest.mark.slurm
SCRIPT = Path(__file__).parents[2] / "slurm" / "multi_node.sbatch"
STEPS, BURSTS, MORE = 200, 4, 15


def rank_on(slurm: VirtualSlurm, node: str) -> psutil.Process:
    (pid,) = set(rank_pids(slurm)) & set(slurm.pids(node))
    return psutil.Process(pid)


def named(job: Job, words: str) -> list[str]:
    """What the run has said of phases that this rank held up."""
    events = read_records(job.folder("straggling") / EVENTS)
    return [e["message"] for e in events if e["kind"] == "slow" and words in e["message"]]


def test_a_straggling_node_is_named_in_one_line(virtual_slurm: VirtualSlurm, job: Job) -> None:
    for step in range(STEPS):
        save_rollouts(job.root / "many", step, rollouts(step))
    settings = [*job.settings("straggling"), f"train.steps={STEPS}"]
    settings += [f"rollout.replay={job.root / 'many'}"]
    output = job.root.parent / "straggling.out"
    words = [f"--output={output}", "--nodes=2", str(SCRIPT), "gsm8k_bytes", *settings]
    number = virtual_slurm.sbatch(*words, SERVER_NODES="0")
    told = straggle(virtual_slurm, job, number)
    assert re.match(r"\w+ took \d+\.\d\d s, \d+\.\d times its median: rank 1 \(\w+\) ", told)
    assert virtual_slurm.wait_for_end(number, PATIENCE_S) == "COMPLETED", output.read_text()
    log = job.folder("straggling") / "logs" / f"job-{number}.0" / "trainer.out"
    assert f"slow: {told}" in log.read_text()
    assert [record["step"] for record in job.records("straggling")] == list(range(1, STEPS + 1))


def straggle(slurm: VirtualSlurm, job: Job, number: int) -> str:
    """Crowds the second node's rank, time and again, until the run names it."""
    wait_until(lambda: job.records("straggling"), "a step", PATIENCE_S)
    nodes = slurm.run("scontrol", "show", "hostnames", slurm.job(number)["NodeList"]).split()
    words = f"median: rank 1 ({nodes[1]})"
    for _ in range(BURSTS):
        wait_for_more_steps(job)  # its medians: a crowd that stays becomes what is usual
        with crowded(rank_on(slurm, nodes[1])):
            wait_for_more_steps(job, words)
        if found := named(job, words):
            return found[0]
    raise AssertionError(f"never named in {BURSTS} bursts: {named(job, '')}")


def wait_for_more_steps(job: Job, or_words: str = "\0") -> None:
    target = len(job.records("straggling")) + MORE

    def done() -> bool:
        return len(job.records("straggling")) >= target or bool(named(job, or_words))

    wait_until(done, "more steps", PATIENCE_S)
