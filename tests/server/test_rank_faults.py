"""Ranks of one live run that die within a weight sync and that stop, and the run's metrics: on a
server of somebody else's."""

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_prefix.exit_codes import FAILED
from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.records import load_rollouts
from megatron_prefix.rollout.server import Server, free_port
from megatron_prefix.rollout.weights import publish_from_disk
from tests.crowd import crowded
from tests.server.conftest import VOCABULARY
from tests.server.forwarder import Forwarder, forwarder
from tests.server.processes import wait_until
from tests.tiny_models import write_tiny_qwen3

SAVE_EVERY = 2
PATIENCE_S = 200.0
HANG_S = 30.0
BURSTS, BURST_S = 5, 40.0


def write_models(root: Path, served: Path) -> None:
    """The served student with a tokenizer whose words are its ids, and a teacher."""
    shutil.copytree(served, root / "student")
    write_tiny_qwen3(root / "teacher", seed=1, hidden_size=96, vocab_size=VOCABULARY)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("student", "teacher"):
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(root / name)
    lines = [json.dumps({"question": f"{i} {i + 1} {i + 2}"}) for i in range(3, 60)]
    (root / "prompts.jsonl").write_text("\n".join(lines))


class Run:
    """The run under way, and what there is to break of it."""

    def __init__(self, root: Path, server: Server, between: Forwarder) -> None:
        self.folder, self.output, self.between = root / "faults", root / "output", between
        (root / "key").touch(mode=0o600)
        (root / "key").write_text(server.endpoint.api_key)
        settings = {
            "run.name": "faults",
            "run.output_dir": root,
            "run.max_restarts": 1,
            "run.distributed_timeout_s": HANG_S,
            "student.hf_path": root / "student",
            "student.tensor_model_parallel_size": 2,
            "teacher.hf_path": root / "teacher",
            "teacher.pipeline_model_parallel_size": 2,
            "data.path": root / "prompts.jsonl",
            "train.steps": 100000,
            "train.global_batch_size": 8,
            "prefix.policy": "fixed",
            "prefix.min_length": 4,
            "prefix.max_length": 4,
            "rollout.server_urls": f"[{between.url}]",
            "rollout.api_key_file": root / "key",
            "rollout.record": "true",
            "checkpoint.save_interval": SAVE_EVERY,
            "log.tensorboard": "false",
            "log.metrics_port": free_port(),
        }
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_prefix.cli", "train", "gsm8k_bytes"]
                + [f"{key}={value}" for key, value in settings.items()],
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def said(self) -> str:
        return self.output.read_text()

    def lines(self, name: str) -> list[dict]:
        file = self.folder / name
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def waits_for(self, true: object) -> None:
        assert callable(true)
        assert wait_until(lambda: true() or self.process.poll() is not None, PATIENCE_S)
        assert true(), self.said()

    def after_steps(self, more: int) -> int:
        target = len(self.lines("metrics.jsonl")) + more
        self.waits_for(lambda: len(self.lines("metrics.jsonl")) >= target)
        return target

    def ranks(self) -> list[psutil.Process]:
        """By number."""
        children = psutil.Process(self.process.pid).children()
        ranks = [child for child in children if "megatron_prefix.worker" in child.cmdline()]
        return sorted(ranks, key=lambda rank: int(rank.environ()["RANK"]))


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    server: Server,
    model_folder: Path,
    versions: Iterator[int],
) -> Iterator[Run]:
    root = tmp_path_factory.mktemp("ranks")
    write_models(root, model_folder)
    with forwarder(server.url) as between:
        run = Run(root, server, between)
        try:
            run.after_steps(3 * SAVE_EVERY)
            yield run
        finally:
            run.process.kill()
            run.process.wait()
    with SglangClient(server.endpoint) as client:
        publish_from_disk([client], model_folder, next(versions))


def test_a_rank_that_is_killed_within_a_weight_sync_leaves_the_server_of_use(run: Run) -> None:
    """Rank 0, when the server has been told of a bucket and waits for it."""
    killed = threading.Event()

    def kill() -> None:
        run.ranks()[0].kill()
        killed.set()

    run.between.before["/update_weights_from_distributed"] = kill
    assert killed.wait(PATIENCE_S)
    last = run.lines("metrics.jsonl")[-1]["step"]
    run.waits_for(lambda: "resumed after step" in run.said())
    found = re.search(r"resumed after step (\d+)", run.said())
    assert found is not None
    # The newest save may not have been whole yet.
    assert last - 2 * SAVE_EVERY <= int(found[1]) <= last
    run.after_steps(2)
    assert "checksums agree" in run.said().partition("resumed after step")[2]


def test_a_rank_that_is_crowded_out_is_named_with_the_phase_that_it_holds_up(run: Run) -> None:
    def told() -> list[dict]:
        slow = [each for each in run.lines("events.jsonl") if each["kind"] == "slow"]
        return [each for each in slow if each["rank"] == 1 and each["phase"]]

    before = len(told())
    for _ in range(BURSTS):
        run.after_steps(20)  # for its medians; a crowd that stays becomes what is usual
        with crowded(run.ranks()[1]):
            if wait_until(lambda: len(told()) > before, BURST_S):
                break
    slow = told()[before]
    assert slow["phase"] in run.lines("metrics.jsonl")[-1]["seconds"]
    assert re.fullmatch(
        rf"{slow['phase']} took \d+\.\d\d s, \d+\.\d times its median: rank 1 \(\S+\) "
        r"(was not let run for \d+\.\d s|needs \d+\.\d times the others' time for work)",
        slow["message"],
    )
    assert f"slow: {slow['message']}" in run.said()


def scrape(target: str) -> str:
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
        return answer.read().decode()


def test_prometheus_finds_and_reads_trainer_and_server(run: Run) -> None:
    run.after_steps(1)
    trainer, servers = json.loads((run.folder / "metrics_targets.json").read_text())
    page = scrape(trainer["targets"][0])
    assert 'megatron_prefix_servers{run="faults"} 1.0' in page
    assert re.search(r'megatron_prefix_rank_work_seconds\{rank="1",run="faults"\} \d', page)
    assert "sglang:prompt_tokens_total" in scrape(servers["targets"][0])


def test_rollouts_that_take_longer_than_a_collective_may_are_waited_for(run: Run) -> None:
    answered = threading.Event()

    def slow() -> None:
        time.sleep(HANG_S + 10.0)
        answered.set()

    run.between.before["/generate"] = slow
    run.waits_for(answered.is_set)
    run.after_steps(2)
    assert "no progress: " not in run.said()


def test_a_rank_that_stops_ends_the_run_with_the_stacks_of_all(run: Run) -> None:
    run.after_steps(1)
    run.ranks()[1].send_signal(signal.SIGSTOP)
    assert run.process.wait(PATIENCE_S) == FAILED, "its one restart was used before"
    report = run.said().rpartition("no progress: ")[2]
    assert re.match(r"rank 0: \w+.* of step \d+ for \d+\.\d s; rank 1: \w+", report), run.said()
    assert "without a word" not in report
    for rank in range(2):
        stacks = (run.folder / "logs" / "stacks" / f"rank_{rank}.txt").read_text()
        assert stacks.startswith(f"rank {rank}: ")
        assert "trainer.py" in stacks, stacks
    assert not [child for child in psutil.process_iter() if is_of(child, run)]


def is_of(process: psutil.Process, run: Run) -> bool:
    with contextlib.suppress(psutil.Error):
        return str(run.folder) in " ".join(process.cmdline()) and process.pid != os.getpid()
    return False


def test_no_step_and_no_rollout_was_counted_twice(run: Run) -> None:
    records = run.lines("metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    rollouts = [load_rollouts(run.folder / "rollouts", step) for step in range(len(records))]
    prompts = [each.prompt_index for each in itertools.chain.from_iterable(rollouts)]
    assert prompts == list(range(8 * len(records)))
