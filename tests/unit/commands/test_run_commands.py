"""``megatron-prefix status``, ``logs`` and ``cancel`` on this machine: real processes and folders.

What they say of a job of Slurm's is tested in tests/slurm/test_launch.py.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_prefix.cli import main
from megatron_prefix.config import Recipe, RunConfig, TrainConfig
from megatron_prefix.jobs.attempts import Follower, run_attempts
from megatron_prefix.jobs.cancel import Patience, cancel_run
from megatron_prefix.jobs.run_state import is_active, last_record, read_state, state_lines
from megatron_prefix.jobs.slurm_queue import JobState
from megatron_prefix.jobs.starts import (
    JOBS,
    LocalStart,
    SlurmJob,
    note_end,
    note_own_job,
    note_slurm_job,
    note_this_process,
    read_starts,
)
from megatron_prefix.recipe import save_record
from megatron_prefix.run_files.jsonl import EVALUATIONS, METRICS, JsonLines, metrics_record
from tests.run_folders import metrics

# Writes its number and that of its signal; a first TERM "saves" and ends with 75.
LAUNCHER = """\
import signal, sys, time
from pathlib import Path
from megatron_prefix.jobs.starts import note_end, note_this_process
folder, stubborn = Path(sys.argv[1]), len(sys.argv) > 2
start = note_this_process(folder)
def stop(number, frame):
    if not stubborn:
        (folder / "checkpoints" / "step_00000007").mkdir(parents=True)
        note_end(folder, start, 75)
        sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("step 1/9 loss 0.5", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "a $(touch INJECTED) run"
    save_record(Recipe(run=RunConfig(name=folder.name), train=TrainConfig(steps=9)), folder)
    (folder / "logs").mkdir()
    return folder


@pytest.fixture
def launched(folder: Path):
    """Starts a launcher that says where it is; its process."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> subprocess.Popen[bytes]:
        output = folder / "logs" / f"local-{len(started)}.out"
        command = [sys.executable, "-c", LAUNCHER, str(folder), *words]
        started.append(subprocess.Popen(command, stdout=output.open("wb")))
        wait_for(lambda: any(start.runs() for start in local_starts(folder)))
        wait_for(
            lambda: b"step" in (folder / "logs" / f"local-{len(started) - 1}.out").read_bytes()
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def local_starts(folder: Path) -> list[LocalStart]:
    return [start for start in read_starts(folder) if isinstance(start, LocalStart)]


def write_steps(folder: Path, count: int) -> None:
    lines = JsonLines(folder / METRICS)
    for step in range(1, count + 1):
        lines.write(metrics_record(metrics(step, 5000, 0.25)))  # a line longer than a block
    lines.close()


def test_starts_are_read_back_each_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note_slurm_job(folder, 12, "/nemo/a b")
    note_slurm_job(folder, 12, "elsewhere")
    start = note_this_process(folder)
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    monkeypatch.setenv("SLURM_HET_JOB_ID", "13")
    note_own_job(folder)
    note_own_job(folder)
    with (folder / JOBS).open("a") as file:
        file.write('{"executor": "moon"}\n[1]\n{"executor": "slurm", "time": 1')
    assert isinstance(start, LocalStart)
    assert read_starts(folder) == [SlurmJob(12, "/nemo/a b"), start, SlurmJob(13)]
    assert start.runs() and start.is_here


def test_a_launcher_within_a_known_job_is_that_job(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "14")
    note_own_job(folder)
    assert note_this_process(folder) is None
    note_end(folder, None, 0)
    assert read_starts(folder) == [SlurmJob(14)]


def test_a_process_of_another_time_with_the_same_number_is_not_ours() -> None:
    me = psutil.Process()
    assert LocalStart("here", me.pid, me.create_time()).runs()
    assert not LocalStart("here", me.pid, me.create_time() - 60).runs()


def test_the_last_record_of_a_long_file_is_found_from_its_end(folder: Path) -> None:
    path = folder / METRICS
    assert last_record(path) == {}
    write_steps(folder, 3)
    assert len(path.read_bytes()) > 3 * 2**14
    assert last_record(path)["step"] == 3
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # it is being written
    assert last_record(path)["step"] == 3
    path.write_text('{"step": 1}\n')
    assert last_record(path) == {"step": 1}


def test_status_says_what_runs_how_far_it_is_and_what_was_remarkable(
    folder: Path, launched, capsys: pytest.CaptureFixture[str]
) -> None:
    launched()
    write_steps(folder, 5)
    (folder / "checkpoints" / "step_00000004").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000005.partial").mkdir()
    evaluations = [{"step": step, "accuracy": step / 6.4, "n": 40} for step in (0, 4)]
    (folder / EVALUATIONS).write_text("".join(json.dumps(e) + "\n" for e in evaluations))
    events = [
        {"time": 1.0, "step": 3, "kind": "slow", "message": "phase student took 3x"},
        {"time": 2.0, "step": 3, "kind": "resume", "message": "resumed"},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    assert main(["status", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"process {local_starts(folder)[0].pid} on" in told and ": RUNNING" in told
    assert "step 5 of 9" in told and "loss 0.25" in told
    assert "newest whole checkpoint: step 4, 1 steps behind" in told
    assert "1 slow; last: step 3: slow: phase student took 3x" in told
    assert "accuracy after step 4: 62.5% of 40\n" in told
    assert main(["status", str(folder / "recipe.yaml"), "--json"]) == 0
    (state,) = json.loads(capsys.readouterr().out)
    assert (state["step"], state["steps"], state["checkpoint"]) == (5, 9, 4)
    assert state["active"] and state["verdicts"] == {"slow": 1}
    assert state["evaluation"] == {"step": 4, "accuracy": 0.625, "n": 40}


def test_a_killed_launcher_is_told_from_one_that_ended(folder: Path, launched) -> None:
    process = launched()
    process.kill()
    process.wait()
    (start,) = read_state(folder).starts
    assert (start.state, start.runs) == ("KILLED", False)
    assert not is_active(folder)


@pytest.mark.parametrize(("code", "word"), [(0, "COMPLETED"), (75, "SAVED"), (1, "FAILED")])
def test_ends_have_words(folder: Path, code: int, word: str) -> None:
    note_end(folder, note_this_process(folder), code)
    (start,) = read_state(folder).starts
    assert (start.state, start.detail, start.runs) == (word, f"exit code {code}", False)


def test_a_jobs_state_is_slurms_word(folder: Path) -> None:
    note_slurm_job(folder, 12)
    waiting = read_state(folder, lambda number: JobState(number, "PENDING", "(Resources)"))
    assert waiting.active
    assert "job 12: PENDING (Resources)" in "\n".join(state_lines(waiting))
    for attempt in (0, 1):
        (folder / "logs" / f"job-12.{attempt}").mkdir()
        (folder / "logs" / f"job-12.{attempt}" / "trainer.out").touch()
    ended = read_state(folder, lambda number: JobState(number, "FAILED", exit_code="75:0"))
    assert (ended.active, ended.attempts) == (False, 2)
    assert "job 12: FAILED exit code 75" in "\n".join(state_lines(ended))


def test_logs_show_the_newest_attempt_or_the_one_that_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nemo = folder.parent / "nemo job"
    nemo.mkdir()
    note_slurm_job(folder, 9, str(nemo))
    note_slurm_job(folder, 12)
    for path, text in {
        nemo / "log-megatron-prefix.x-0_9_0.out": "nine\n",
        nemo / "log-megatron-prefix.x-1_9_0.out": "nine's servers\n",
        folder / "logs/job-12.0/trainer.out": "first\n",
        folder / "logs/job-12.10/trainer.out": "".join(f"line {i}\n" for i in range(100)),
        folder / "logs/job-12.10/servers.out": "serving\n",
        folder / "logs/job-12.2/trainer.out": "third\n",
    }.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def shown(*words: str) -> list[str]:
        assert main(["logs", str(folder), *words]) == 0
        return capsys.readouterr().out.splitlines()

    assert shown("-n", "2")[1:] == ["line 98", "line 99"]
    assert len(shown("-n", "0")) == 101
    assert shown("--attempt", "12.2")[1:] == ["third"]
    assert shown("--servers")[1:] == ["serving"]
    assert shown("--attempt", "9.0")[1:] == ["nine"]
    assert shown("--attempt", "9.0", "--servers")[1:] == ["nine's servers"]
    names = [line.split()[0] for line in shown("--list")]
    assert names == ["9.0", "9.0", "12.0", "12.2", "12.10", "12.10"]
    assert main(["logs", str(folder), "--attempt", "12.3"]) == 2
    assert "--attempt 12.3 is not one of the run's: 9.0, 12.0" in capsys.readouterr().err


def test_servers_of_teachers_have_logs_too(folder: Path) -> None:
    note_this_process(folder)
    for name in ("rank_0.log", "server-0.log", "teacher-server-0.log"):
        (folder / "logs" / name).touch()
    (attempt,) = run_attempts(folder)
    assert [path.name for path in attempt.servers] == ["server-0.log", "teacher-server-0.log"]


def test_logs_are_followed_over_a_requeue_until_the_run_ends(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_prefix.jobs.attempts._LOOK_S", 0.05)
    monkeypatch.setattr("megatron_prefix.jobs.attempts._POLL_S", 0.01)
    note_slurm_job(folder, 12)
    logs, over = [folder / f"logs/job-12.{i}/trainer.out" for i in (0, 1, 2)], threading.Event()
    for path in logs:
        path.parent.mkdir()
    logs[0].write_text("old\nold 2\n")
    shown = ""

    def seen(words: str) -> bool:
        nonlocal shown
        shown += capsys.readouterr().out
        return words in shown

    follower = Follower(folder, False, lambda: not over.is_set())
    thread = threading.Thread(target=follower.follow, args=(1,))
    thread.start()
    wait_for(lambda: seen("old 2"))
    with logs[0].open("a") as file:
        file.write("half")
        file.flush()
        wait_for(lambda: seen("half"))
        file.write(" and half\n")
    logs[1].write_text("attempt 1\nkilled in mid-li")
    wait_for(lambda: seen("mid-li"))
    logs[2].write_text("attempt 2\n")
    wait_for(lambda: seen("attempt 2"))
    over.set()
    with logs[2].open("a") as file:
        file.write("last words\n")
    thread.join(60)
    assert not thread.is_alive() and seen("last words")
    told = [line for line in shown.splitlines() if not line.startswith("==> ")]
    assert told == "old 2|half and half|attempt 1|killed in mid-li|attempt 2|last words".split("|")


def test_cancel_has_a_launcher_save(
    folder: Path, launched, capsys: pytest.CaptureFixture[str]
) -> None:
    process = launched()
    threading.Thread(target=process.wait).start()  # a child of ours would be left a zombie
    assert main(["cancel", str(folder)]) == 0
    assert process.wait() == 75
    assert "step 7 is saved: run the same command again to resume" in capsys.readouterr().out
    assert read_state(folder).starts[0].state == "SAVED"
    assert main(["cancel", str(folder)]) == 0, "there is nothing left to end"
    words = "nothing is running; step 7 is saved: run the same command again to resume\n"
    assert capsys.readouterr().out == f"{folder}: {words}"
    write_steps(folder, 9)
    assert main(["cancel", str(folder)]) == 0
    complete = "nothing is running: the run is complete at step 9\n"
    assert capsys.readouterr().out == f"{folder}: {complete}"


@pytest.mark.parametrize(("words", "code"), [(["--save-within", "0.5"], 1), (["--now"], 0)])
def test_cancel_kills_what_does_not_save_in_time(
    words: list[str], code: int, folder: Path, launched, capsys: pytest.CaptureFixture[str]
) -> None:
    process = launched("stubborn")
    assert main(["cancel", str(folder), *words]) == code
    assert process.wait() == -signal.SIGKILL
    assert "nothing is saved; the same command starts anew" in capsys.readouterr().out


def test_a_process_that_ends_while_another_is_waited_for_is_signalled_no_more(
    folder: Path, launched
) -> None:
    first, second = launched("stubborn"), launched()
    told: list[str] = []

    def say(words: str) -> None:
        told.append(words)
        if second.poll() is None:
            second.kill()
            second.wait()

    assert not cancel_run(folder, Patience(0.5), say)
    assert first.wait() == -signal.SIGKILL
    assert told[-1] == f"process {second.pid}: ended by itself"


def test_a_process_of_another_machine_is_left_to_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / JOBS).write_text(
        '{"time": 1, "executor": "local", "host": "moon", "pid": 1, "born": 5.0}\n'
    )
    assert main(["cancel", str(folder)]) == 2
    assert "give the command on moon" in capsys.readouterr().err
    assert read_state(folder).starts[0].state == "ELSEWHERE"


def test_a_run_that_nobody_started_has_no_logs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["logs", str(folder)]) == 2
    assert "the run has no log yet" in capsys.readouterr().err
    assert main(["status", str(folder)]) == 0
    assert "nothing is known to have started it" in capsys.readouterr().out
    assert not list(Path(os.getcwd()).glob("INJECTED"))
