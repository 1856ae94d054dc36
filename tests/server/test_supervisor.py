"""A supervisor over processes that end, hang or are given up; small HTTP servers play SGLang's."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.addresses import read_endpoints, report_lost
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.server import Server, ServerFailed, free_port
from megatron_prefix.rollout.supervisor import Supervisor

CONFIG = RolloutConfig(server_restarts=2, start_timeout_s=60.0)
ANSWER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *words):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
REFUSE = "print('an Error of its own'); raise SystemExit(3)"


class Starter:
    def __init__(self, folder: Path) -> None:
        self.folder, self.script, self.started = folder, ANSWER, list[tuple[int, int, str]]()

    def __call__(self, index: int, port: int, api_key: str) -> Server:
        self.started.append((index, port, api_key))
        port, log = port or free_port(), self.folder / f"server-{index}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", self.script, str(port)],
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        endpoint = Endpoint(f"http://127.0.0.1:{port}", api_key or f"key-{index}")
        return Server(endpoint, process, log, 0, tempfile.TemporaryDirectory())


@pytest.fixture
def starter(tmp_path: Path) -> Starter:
    return Starter(tmp_path)


@pytest.fixture
def supervisor(starter: Starter) -> Iterator[Supervisor]:
    supervisor = Supervisor(starter, CONFIG)
    yield supervisor
    supervisor.stop()


def poll_until(supervisor: Supervisor, true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        supervisor.poll()
        time.sleep(0.02)


def listens(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rpartition(":")[2]))) == 0


def test_a_killed_server_is_started_again_at_its_address_with_its_key(
    supervisor: Supervisor, starter: Starter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "endpoints.json"
    first, second = supervisor.add(), supervisor.add()
    supervisor.publish(file)
    poll_until(supervisor, lambda: all(post.served for post in supervisor._posts))
    os.kill(first.process.pid, signal.SIGKILL)
    poll_until(supervisor, lambda: read_endpoints(file)[0].start == 1)
    again, other = read_endpoints(file)
    assert (again.url, again.api_key) == (first.endpoint.url, first.endpoint.api_key)
    assert other == second.endpoint
    assert starter.started[2] == (0, int(again.url.rpartition(":")[2]), "key-0")
    poll_until(supervisor, lambda: listens(again.url) and supervisor._posts[0].answered)
    told = capsys.readouterr().err
    assert "is gone (it ended" in told and "restart 1 of 2 in a row" in told
    assert f"{again.url} answers again" in told
    assert "key-" not in told


def test_a_server_that_the_trainer_gave_up_is_killed_though_it_stands_still(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    file = tmp_path / "endpoints.json"
    server = supervisor.add()
    supervisor.publish(file)
    poll_until(supervisor, lambda: supervisor._posts[0].served)
    os.kill(server.process.pid, signal.SIGSTOP)
    (endpoint,) = read_endpoints(file)
    report_lost(endpoint, "it hangs")
    poll_until(supervisor, lambda: read_endpoints(file)[0].start == 1)
    assert server.process.returncode is not None, "SIGTERM alone would wait for it"
    report_lost(endpoint, "it hangs")  # the first start is meant
    for _ in range(5):
        supervisor.poll()
    assert read_endpoints(file)[0].start == 1
    assert supervisor.servers[0].exit_code() is None


def test_restarts_in_a_row_are_bounded_and_the_last_servers_end_is_an_error(
    supervisor: Supervisor, starter: Starter, tmp_path: Path
) -> None:
    supervisor.add()
    supervisor.publish(tmp_path / "endpoints.json")
    poll_until(supervisor, lambda: supervisor._posts[0].served)
    starter.script = REFUSE
    os.kill(supervisor.servers[0].process.pid, signal.SIGKILL)
    with pytest.raises(ServerFailed, match="has ended; log: .*an Error of its own"):
        poll_until(supervisor, lambda: False)
    assert len(starter.started) == 1 + CONFIG.server_restarts
    assert read_endpoints(tmp_path / "endpoints.json") == []


def test_a_server_that_never_answered_is_not_started_again(
    supervisor: Supervisor, starter: Starter
) -> None:
    starter.script = REFUSE
    supervisor.add()
    with pytest.raises(ServerFailed, match="an Error of its own"):
        poll_until(supervisor, lambda: False)
    assert len(starter.started) == 1


def test_a_server_that_does_not_answer_after_its_restart_names_its_own_setting(
    starter: Starter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    supervisor = Supervisor(starter, replace(CONFIG, start_timeout_s=0.0), "teacher.server")
    try:
        server = supervisor.add()
        poll_until(supervisor, lambda: supervisor._posts[0].served)
        starter.script = "import time; time.sleep(600)"
        os.kill(server.process.pid, signal.SIGKILL)
        poll_until(supervisor, lambda: supervisor._posts[0].restarts == 2)
    finally:
        supervisor.stop()
    told = capsys.readouterr().err
    assert "is gone (it did not answer in teacher.server.start_timeout_s; " in told


def test_an_ended_lease_is_not_renewed(supervisor: Supervisor, tmp_path: Path) -> None:
    file = tmp_path / "endpoints.json"
    server = supervisor.add()
    supervisor.publish(file)
    poll_until(supervisor, lambda: supervisor._posts[0].served)
    file.unlink()
    os.kill(server.process.pid, signal.SIGKILL)
    poll_until(supervisor, lambda: supervisor.servers[0] is not server)
    assert not file.exists()
