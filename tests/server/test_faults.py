"""One live run and everything that can happen to its servers and ranks, one fault after another:
nothing is lost but the steps since the last save, and no rollout is counted twice."""

import contextlib
import itertools
import json
import os
import re
import signal
import stat
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from megatron_prefix.exit_codes import SAVED
from megatron_prefix.rollout.addresses import read_endpoints
from megatron_prefix.rollout.client import Endpoint, SglangClient
from megatron_prefix.rollout.protocol import RequestRefused
from tests.server.processes import wait_until
from tests.server.test_main_job import Job

SAVE_EVERY = 2
PATIENCE_S = 400.0  # a server's start alone takes minutes on busy cores
SETTINGS = (
    "train.steps=100000",
    f"checkpoint.save_interval={SAVE_EVERY}",
    "checkpoint.export_hf=false",
    "rollout.num_servers=2",
    "rollout.verify_weights_every=3",
    "rollout.hang_timeout_s=12",
    "rollout.sync_timeout_s=20",
    "rollout.retries=1",
    "rollout.start_timeout_s=380",
    "run.distributed_timeout_s=600",
    "run.max_restarts=9",
    "log.tensorboard=false",
    "prefix.policy=fixed",
)


class Run:
    """The job under way, and what there is to break of it."""

    def __init__(self, root: Path) -> None:
        self.job = Job(root)
        self.output = root / "output"
        # Its own folder for scratch: the servers' addresses are found there.
        self.scratch = root / "scratch"
        self.keys: list[str] = []
        self.commands = b""
        self.scratch.mkdir()
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                self.job.command(*SETTINGS),
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.scratch)},
            )

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def said(self) -> str:
        return self.output.read_text()

    def steps(self) -> int:
        records = self.job.records()
        return records[-1]["step"] if records else 0

    def after_steps(self, more: int) -> int:
        """Wait until ``more`` further steps were taken; the last one."""
        target = self.steps() + more
        reached = wait_until(lambda: self.steps() >= target or self.ended(), PATIENCE_S)
        assert reached and not self.ended(), self.said()
        return self.steps()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def says(self, words: str, since: int = 0) -> None:
        heard = wait_until(lambda: words in self.said()[since:] or self.ended(), PATIENCE_S)
        assert heard and words in self.said()[since:], self.said()

    def endpoints(self) -> list[Endpoint]:
        (file,) = self.scratch.glob("megatron-prefix-*/endpoints.json")
        return read_endpoints(file)

    def server(self, index: int) -> list[psutil.Process]:
        """SGLang's processes of one server, the guard left out."""
        port = self.endpoints()[index].url.rpartition(":")[2]
        guards = [
            child
            for child in psutil.Process(self.process.pid).children()
            if f"--port\0{port}\0" in "\0".join(child.cmdline())
        ]
        return [process for guard in guards for process in guard.children(recursive=True)]

    def ranks(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children()
        return [child for child in children if "megatron_prefix.worker" in child.cmdline()]

    def checkpoints(self) -> list[Path]:
        return sorted((self.job.folder / "checkpoints").glob("step_????????"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    run = Run(tmp_path_factory.mktemp("faults"))
    try:
        run.after_steps(3)
        run.keys = [endpoint.api_key for endpoint in run.endpoints()]
        run.commands = all_commands()
        yield run
    finally:
        run.stop()


def all_commands() -> bytes:
    """The command lines of this machine's processes."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline()).encode())
    return b"\n".join(found)


def send(number: int, processes: Sequence[psutil.Process]) -> None:
    assert processes
    for process in processes:
        process.send_signal(number)


def test_servers_that_are_killed_and_that_hang_are_replaced_and_the_ranks_stay(run: Run) -> None:
    """The second hangs while the first is on its way back, so that none may be left for a while."""
    send(signal.SIGKILL, run.server(0)[:1])
    run.says("restart 1 of 5 in a row")
    run.after_steps(1)
    send(signal.SIGSTOP, run.server(1))
    run.says("the trainer gave it up")
    assert wait_until(lambda: run.said().count("is back") == 2 or run.ended(), PATIENCE_S)
    run.after_steps(3)
    assert [endpoint.start for endpoint in run.endpoints()] == [1, 1]
    assert run.said().count("lost the SGLang server") == 2
    assert "checksums agree" in run.said().rpartition("is back")[2]
    assert "resumed after step" not in run.said()


def test_old_weights_are_found_by_their_version_and_replaced(run: Run) -> None:
    """Again and again, since the trainer's next sync may come before its next look."""
    said = len(run.said())

    def found() -> bool:
        with SglangClient(run.endpoints()[1]) as client, contextlib.suppress(RequestRefused):
            client.load_weights(str(run.job.student), policy_version=0)
        told = run.said()[said:]
        return "holds weights v0, not v" in told or "sampled with policy version 0" in told

    assert wait_until(found, PATIENCE_S)
    run.after_steps(3)
    assert "restart" not in run.said()[said:], "sending the weights anew is enough"
    assert "checksums agree" in run.said()[said:]


def resumed_after(run: Run, said: int) -> int:
    run.says("resumed after step", said)
    found = re.findall(r"resumed after step (\d+)", run.said()[said:])
    return int(found[0])


def test_a_killed_rank_costs_no_more_than_the_steps_since_the_last_save(run: Run) -> None:
    said, before = len(run.said()), run.after_steps(3)
    send(signal.SIGKILL, run.ranks()[1:])
    # The newest save may not have been whole yet.
    assert before - 2 * SAVE_EVERY <= resumed_after(run, said)
    run.after_steps(2)
    assert "the ranks start again" in run.said()[said:]


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_used(run: Run) -> None:
    run.after_steps(2 * SAVE_EVERY)
    said = len(run.said())
    send(signal.SIGSTOP, run.ranks())  # so that no further one is written
    newest, before = run.checkpoints()[-1], run.checkpoints()[-2]
    largest = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    send(signal.SIGKILL, run.ranks())
    assert resumed_after(run, said) == int(before.name.removeprefix("step_"))
    assert f"{newest.name} is damaged and is not used" in run.said()[said:]
    run.after_steps(2)


def test_nothing_was_counted_twice_or_trained_on_other_weights(run: Run) -> None:
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(PATIENCE_S) == SAVED, run.said()
    records = run.job.records()
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    for record in records:
        assert record["policy_version"] == record["step"] - 1
        assert record["policy_lag"] == 0
        assert record["logprob_diff_max"] < 1e-3
    prompts = [prompts_of(run, step) for step in range(len(records))]
    flat = list(itertools.chain.from_iterable(prompts))
    assert flat == list(range(len(flat))), "each prompt once, in its order"


def prompts_of(run: Run, step: int) -> list[int]:
    from megatron_prefix.rollout.records import load_rollouts

    rollouts = load_rollouts(run.job.folder / "rollouts", step)
    return [rollout.prompt_index for rollout in rollouts]


def test_its_keys_were_never_shown(run: Run) -> None:
    """Nor on a command line while it ran. SGLang's own logs, which only the user can read, are
    left out."""
    assert run.ended() and len(run.keys) == 2
    folder = run.job.folder
    logs = list((folder / "logs").glob("server-*.log"))
    assert len(logs) == 2 and {stat.S_IMODE(log.stat().st_mode) for log in logs} == {0o600}
    texts = [path for path in folder.rglob("*") if path.is_file() and path not in logs]
    seen = run.said().encode() + run.commands + b"".join(path.read_bytes() for path in texts)
    assert b"sglang.launch_server" in run.commands and b"step_0" in seen
    assert not [key for key in run.keys if key.encode() in seen]
    events = [json.loads(line) for line in (folder / "events.jsonl").open()]
    assert {"servers", "resume"} <= {event["kind"] for event in events}
