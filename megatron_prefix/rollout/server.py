"""SGLang server processes on this machine: start, watch, stop.

No server outlives its trainer: it is stopped by :meth:`Server.stop`, and a guard (``guard.py``)
kills it when the process that started it ends in any other way. It is in a session of its own, so
that a Ctrl-C in the terminal reaches the trainer alone, which then saves and stops it in order.
"""

import contextlib
import json
import os
import random
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.client import Endpoint, SglangClient
from megatron_prefix.rollout.command import (
    LOOPBACK,
    Launch,
    resolve_device,
    served_architecture,
    server_arguments,
    server_environment,
)
from megatron_prefix.rollout.protocol import ServerUnavailable

_GUARD = Path(__file__).resolve().with_name("guard.py")
_FIRST_PORT = 10000
_POLL_S = 0.2
# Between SIGTERM and SIGKILL. SGLang may sleep for 5 s before it looks at a SIGTERM, and then takes
# 4 s to leave; it has nothing to save.
_TERMINATE_S = 2.0
_GROUP_S = 5.0  # for killed processes to be gone
_LOG_LINES = 4  # of a dead server's log in the error


class ServerFailed(RuntimeError):
    """A server's process ended, or did not answer in time; the message has its log's last words."""


@dataclass
class Server:
    """One running server. Made by :func:`start_server`."""

    endpoint: Endpoint
    process: subprocess.Popen[bytes]  # its guard, which leads its process group
    log_path: Path
    log_start: int  # bytes of the log that earlier starts wrote
    scratch: tempfile.TemporaryDirectory[str]
    swept: bool = False

    @property
    def url(self) -> str:
        return self.endpoint.url

    def exit_code(self) -> int | None:
        """None while the server runs; what its guard ended with once it does not."""
        code = self.process.poll()
        if code is not None and not self.swept:
            self._kill_group()
        return code

    def raise_if_dead(self) -> None:
        """Raises ServerFailed with the log's last error lines where the server has ended."""
        if self.exit_code() is not None:
            raise ServerFailed(
                f"the SGLang server at {self.url} has ended; "
                f"log: {self.log_path}; {last_errors(self.log_path, self.log_start)}"
            )

    def stop(self, *, timeout_s: float = _TERMINATE_S) -> None:
        """End the process and all of its group; returns when they are gone."""
        if self.exit_code() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
        if not self.swept:
            self._kill_group()
        self.process.wait()
        self.scratch.cleanup()

    def _kill_group(self) -> None:
        """Once only: later, the group's number may be another's. Waits until the group is gone,
        though not for ever: where no init reaps them, dead children stay in it."""
        self.swept = True
        deadline = time.monotonic() + _GROUP_S
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.poll()
                time.sleep(0.01)


def start_server(
    model_path: str | Path,
    rollout: RolloutConfig,
    *,
    params_dtype: str,
    log_path: str | Path,
    index: int = 0,
    port: int = 0,
    seed: int = 0,
    host: str = LOOPBACK,
    api_key: str = "",
    first_gpu: int = 0,
) -> Server:
    """Start one server on ``host`` alone and return at once; :func:`wait_healthy` waits for it.

    ``params_dtype`` (bf16, fp32) is the student's, for ``rollout.dtype="auto"``; ``index`` tells
    servers of one machine apart (their GPUs and seeds); ``port`` 0 picks a free one, an empty
    ``api_key`` a new one. ``first_gpu``: where the GPUs of server 0 begin. The log is appended to.

    Raises ValueError where ``port`` is taken or ``model_path`` has no readable config.json.
    """
    folder = Path(model_path).resolve()
    architecture = served_architecture(folder)
    port = checked_port(port, host) if port else free_port(host)
    device = resolve_device(rollout.device)
    scratch = tempfile.TemporaryDirectory(prefix="megatron-prefix-server-")
    api_key = api_key or secrets.token_hex(32)  # of no character that argparse takes for an option
    settings = Path(scratch.name, "server.yaml")
    _write_private(settings, json.dumps({"api-key": api_key}))  # JSON is YAML
    launch = Launch(folder, device, params_dtype, port, index, seed, host, first_gpu)
    command = [sys.executable, "-m", "sglang.launch_server", "--config", str(settings)]
    command += server_arguments(launch, rollout)
    log = Path(log_path).resolve()
    environment = server_environment(device, architecture, Path(scratch.name))
    log_start, process = _spawn(command, environment, log, settings)
    endpoint = Endpoint(
        url=f"http://{host}:{port}",
        api_key=api_key,
        timeout_s=rollout.request_timeout_s,
        retries=rollout.retries,
    )
    return Server(endpoint, process, log, log_start, scratch)


def free_port(host: str = LOOPBACK) -> int:
    """A TCP port of ``host`` that nothing listens on now, and that no socket gets by chance.

    Ports that the kernel hands out by itself are left alone: a server binds its port after half a
    minute of imports, and by then a rank's gloo socket would have it now and then.
    """
    with open("/proc/sys/net/ipv4/ip_local_port_range") as limits:
        first_handed_out = int(limits.read().split()[0])
    for port in random.SystemRandom().sample(range(_FIRST_PORT, first_handed_out), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise ServerFailed(f"no free port of {_FIRST_PORT} to {first_handed_out - 1} in 100 tries")


def checked_port(port: int, host: str = LOOPBACK) -> int:
    """``port``, or ValueError where something listens on it already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} is in use ({error.strerror}); stop what listens there or choose "
                "another port, 0 for any that is free"
            ) from error
    return port


def _write_private(path: Path, text: str) -> None:
    """For the key: other users of the machine read neither this nor the command line."""
    path.touch(mode=0o600)
    path.write_text(text)


def _spawn(
    command: Sequence[str], environment: dict[str, str], log: Path, private: Path
) -> tuple[int, subprocess.Popen[bytes]]:
    """Start ``command`` under the guard, which keeps the values in ``private`` out of the log; also
    the size of the log before it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    guard = [sys.executable, "-I", str(_GUARD), "--hide", str(private), str(os.getpid())]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "ab") as output:
        start = output.tell()
        now = datetime.now().isoformat(timespec="seconds")
        output.write(f"\n=== {now} {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            [*guard, *command],
            env=environment,
            cwd=private.parent,  # `python -m` has it first on its path: nothing of the user's there
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return start, process


def wait_healthy(
    servers: Sequence[Server], *, timeout_s: float, should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Return when every server answers, or when ``should_stop`` says so.

    ``/model_info`` is asked, since ``/health`` generates a token. Raises ServerFailed at once
    where a server's process ends, and after ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    waiting = list(servers)
    while waiting and not should_stop():
        waiting = [server for server in waiting if not _answers(server)]
        if waiting and time.monotonic() > deadline:
            slow = waiting[0]
            raise ServerFailed(
                f"the SGLang server at {slow.url} did not answer within {timeout_s:g} s; "
                f"raise rollout.start_timeout_s; log: {slow.log_path}; "
                f"{last_errors(slow.log_path, slow.log_start)}"
            )
        if waiting:
            time.sleep(_POLL_S)


def _answers(server: Server) -> bool:
    server.raise_if_dead()
    with SglangClient(server.endpoint) as client:
        try:
            client.model_info(timeout_s=5.0, retries=0)
        except ServerUnavailable:  # not yet
            return False
    return True


def last_errors(log: Path, start: int = 0) -> str:
    """The log's last lines that speak of an error, after byte ``start``; else its last lines."""
    with log.open("rb") as handle:
        handle.seek(start)
        text = handle.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "error:" in line]
    return "last lines: " + " | ".join((telling or lines)[-_LOG_LINES:])


@contextlib.contextmanager
def server_pool(
    model_path: str | Path,
    rollout: RolloutConfig,
    *,
    params_dtype: str,
    log_folder: str | Path,
    seed: int = 0,
    host: str = LOOPBACK,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[list[Server]]:
    """``rollout.num_servers`` healthy servers, with logs ``server-0.log``, ... in ``log_folder``.

    All of them are stopped when the block ends, however it ends.
    """
    servers: list[Server] = []
    with contextlib.ExitStack() as stack:
        for index in range(rollout.num_servers):
            server = start_server(
                model_path,
                rollout,
                params_dtype=params_dtype,
                log_path=Path(log_folder, f"server-{index}.log"),
                index=index,
                seed=seed,
                host=host,
            )
            stack.callback(server.stop)
            servers.append(server)
        stack.callback(_terminate, servers)  # runs first: the servers then stop side by side
        wait_healthy(servers, timeout_s=rollout.start_timeout_s, should_stop=should_stop)
        yield servers


def _terminate(servers: Sequence[Server]) -> None:
    for server in servers:
        if server.exit_code() is None:
            server.process.terminate()
