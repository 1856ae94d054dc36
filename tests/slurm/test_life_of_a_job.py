"""One job on two nodes that meets its time limit, a preemption and a node's death, and the same job
left alone: what they train must be equal to the last bit."""

import os
import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.slurm.conftest import STEPS, Job
from tests.slurm.freeze import PATIENCE_S, frozen_until_signalled, rank_pids
from tests.slurm.virtual_slurm import VirtualSlurm, wait_until

pytestmark = pytest.mark.slurm
SCRIPTS = Path(__file__).parents[2] / "slurm"


def submit(slurm: VirtualSlurm, job: Job, name: str, *options: str, **more: str) -> int:
    words = [f"--output={job.root.parent}/{name}.out", "--nodes=2", *options]
    settings = ["gsm8k_bytes", *job.settings(name)]
    return slurm.sbatch(
        *words, str(SCRIPTS / "multi_node.sbatch"), *settings, SERVER_NODES="0", **more
    )


@dataclass
class Story:
    """What was seen of the interrupted job."""

    number: int
    steps: list[int] = field(default_factory=list)  # taken when each interruption came
    states: list[str] = field(default_factory=list)
    output: str = ""


@pytest.fixture(scope="module")
def plain(virtual_slurm: VirtualSlurm, job: Job) -> tuple[int, str]:
    """Number and last state of the job that is left alone."""
    number = submit(virtual_slurm, job, "plain")
    return number, virtual_slurm.wait_for_end(number, PATIENCE_S)


@pytest.fixture(scope="module")
def story(virtual_slurm: VirtualSlurm, job: Job) -> Story:
    # 30 minutes before the limit: a limit of 10 minutes is then over at once.
    options = ("--partition=low", "--time=60", "--signal=USR1@1800")
    seen = Story(submit(virtual_slurm, job, "story", *options))
    for restarts, interrupt in enumerate((meet_time_limit, be_preempted, lose_a_node), start=1):
        before = len(job.records("story"))
        wait_until(
            lambda done=before: len(job.records("story")) >= done + 3, "3 more steps", PATIENCE_S
        )
        interrupt(virtual_slurm, seen.number)
        virtual_slurm.wait_for_restart(seen.number, restarts, PATIENCE_S)
        seen.steps.append(len(job.records("story")))
        wait_until(lambda: given_an_hour(virtual_slurm, seen.number), "a limit", PATIENCE_S)
    seen.states.append(virtual_slurm.wait_for_end(seen.number, PATIENCE_S))
    seen.output = (job.root.parent / "story.out").read_text()
    return seen


def given_an_hour(slurm: VirtualSlurm, number: int) -> bool:
    """False while Slurm still takes the job that it requeues for one that has ended."""
    try:
        slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")
    except RuntimeError as error:
        if "already finished" not in str(error):
            raise
        return False
    return True


def meet_time_limit(slurm: VirtualSlurm, number: int) -> None:
    with frozen_until_signalled(slurm):
        slurm.run("scontrol", "update", f"JobId={number}", "TimeLimit=10")


def be_preempted(slurm: VirtualSlurm, number: int) -> None:
    with frozen_until_signalled(slurm):
        slurm.sbatch("--partition=high", "--nodes=3", "--exclusive", "--wrap=true")


def lose_a_node(slurm: VirtualSlurm, number: int) -> None:
    """The second of the job's two, on which its script does not run."""
    nodes = slurm.run("scontrol", "show", "hostnames", slurm.job(number)["NodeList"]).split()
    slurm.kill_node(nodes[1])


def test_a_job_that_is_left_alone_completes(
    virtual_slurm: VirtualSlurm, job: Job, plain: tuple[int, str]
) -> None:
    number, state = plain
    assert state == "COMPLETED", (job.root.parent / "plain.out").read_text()
    assert virtual_slurm.job(number)["Restarts"] == "0"
    assert [record["step"] for record in job.records("plain")] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in job.folder("plain").glob("logs/rank_*.log")) == [
        "rank_0.log",
        "rank_1.log",
    ]


def test_time_limit_preemption_and_a_dead_node_each_requeue_the_job(
    virtual_slurm: VirtualSlurm, story: Story
) -> None:
    assert story.states == ["COMPLETED"], story.output
    assert virtual_slurm.job(story.number)["Restarts"] == "3"
    assert 3 <= story.steps[0] < story.steps[1] < STEPS


def resumed_after(job: Job) -> list[int]:
    """The steps that the story's later attempts went on from."""
    events = (job.folder("story") / "events.jsonl").read_text()
    return [int(step) for step in re.findall(r"resumed after step (\d+)", events)]


def test_a_signal_saves_and_ends_with_75(story: Story) -> None:
    number = story.number
    assert f"attempt {number}.0 ended with exit code 75" in story.output
    assert f"attempt {number}.1 ended with exit code 75" in story.output
    assert f"attempt {number}.2 ended" not in story.output, "nobody told it of the dead node"
    assert f"attempt {number}.3 ended with exit code 0" in story.output


def test_what_was_interrupted_trains_what_was_left_alone(
    job: Job, plain: tuple[int, str], story: Story
) -> None:
    assert job.results("story") == job.results("plain")
    assert len(job.results("story")) == STEPS


def test_no_step_is_lost_to_a_signal_and_none_since_the_last_save_to_a_dead_node(
    job: Job, story: Story
) -> None:
    resumed = resumed_after(job)
    assert resumed[:2] == story.steps[:2]
    # A save is begun every second step; the newest may not have been whole yet.
    assert story.steps[2] - 4 <= resumed[2] <= story.steps[2]


def test_attempts_have_logs_of_their_own(job: Job, story: Story) -> None:
    resumed = resumed_after(job)
    logs = [job.folder("story") / "logs" / f"job-{story.number}.{i}" for i in range(4)]
    first_steps = [
        re.findall(r"^0: step (\d+)/", (log / "trainer.out").read_text(), flags=re.MULTILINE)[0]
        for log in logs
    ]
    # Two of them begin alike where a node died before the next save was whole.
    assert [int(step) for step in first_steps] == [step + 1 for step in (0, *resumed)]


def test_nothing_in_a_value_is_run(job: Job, plain: tuple[int, str], story: Story) -> None:
    assert "$(" in str(job.root)
    assert not [path for folder in (Path.cwd(), job.root) for path in folder.rglob("INJECTED")]


def test_a_killed_rank_is_restarted_in_place(
    virtual_slurm: VirtualSlurm, job: Job, plain: tuple[int, str]
) -> None:
    number = submit(virtual_slurm, job, "restarted", MAX_RESTARTS="1")
    saved = job.folder("restarted") / "checkpoints" / "step_00000002"
    wait_until(saved.exists, "a checkpoint", PATIENCE_S)
    os.kill(rank_pids(virtual_slurm)[-1], signal.SIGKILL)
    state = virtual_slurm.wait_for_end(number, PATIENCE_S)
    assert state == "COMPLETED", (job.root.parent / "restarted.out").read_text()
    assert virtual_slurm.job(number)["Restarts"] == "0", "the nodes were kept"
    assert job.results("restarted") == job.results("plain")
    assert "resumed after step" in (job.folder("restarted") / "events.jsonl").read_text()


def test_one_node_saves_on_a_signal_and_goes_on(virtual_slurm: VirtualSlurm, job: Job) -> None:
    number = virtual_slurm.sbatch(
        f"--output={job.root.parent}/alone.out", f"--chdir={job.root}",
        str(SCRIPTS / "one_node.sbatch"), "gsm8k_bytes", *job.settings("alone"),
    )  # fmt: skip
    wait_until(lambda: len(job.records("alone")) >= 3, "3 steps", PATIENCE_S)
    with frozen_until_signalled(virtual_slurm):
        virtual_slurm.run("scancel", "--signal=USR1", str(number))
    virtual_slurm.wait_for_restart(number, 1, PATIENCE_S)
    assert virtual_slurm.wait_for_end(number, PATIENCE_S) == "COMPLETED"
    assert [record["step"] for record in job.records("alone")] == list(range(1, STEPS + 1))
    told = (job.root.parent / "alone.out").read_text()
    assert f"attempt {number}.0 ended with exit code 75" in told
    folder = job.folder("alone") / "logs"
    logs = [folder / f"job-{number}.{attempt}" / "trainer.out" for attempt in (0, 1)]
    assert all(log.stat().st_size for log in logs)
