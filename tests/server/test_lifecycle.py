"""Server processes: how they start, what they say when they cannot, and that none is left."""

import dataclasses
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout import guard
from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.command import (
    LOOPBACK,
    Launch,
    served_architecture,
    server_arguments,
    server_environment,
)
from megatron_prefix.rollout.protocol import RequestRefused
from megatron_prefix.rollout.server import (
    Server,
    ServerFailed,
    checked_port,
    free_port,
    last_errors,
    server_pool,
    start_server,
    wait_healthy,
)
from tests.server.processes import wait_until

CPU = RolloutConfig(device="cpu")


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie is only waiting for its parent to look."""
    return [
        process
        for process in processes
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]


def test_a_port_in_use_is_named() -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} is in use .*choose another port"):
            checked_port(port)
    assert checked_port(port) == port


def test_a_server_does_not_start_on_a_port_in_use(model_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} is in use"):
            start_server(model_folder, CPU, params_dtype="fp32", log_path=log, port=port)
    assert not log.exists()


def test_a_free_port_is_free() -> None:
    assert checked_port(free_port()) > 1024


def test_a_folder_without_a_model_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json names no architecture"):
        start_server(tmp_path, CPU, params_dtype="fp32", log_path=tmp_path / "server.log")
    assert not (tmp_path / "server.log").exists()


def test_a_qwen3_moe_with_dense_layers_is_refused(tmp_path: Path) -> None:
    """SGLang 0.5.23 would make experts for those layers, and serve what memory holds as weights."""
    config = {"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [], "num_experts": 4}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"decoder_sparse_step": 1}))
    assert served_architecture(tmp_path) == "Qwen3MoeForCausalLM"
    for setting in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}):
        path.write_text(json.dumps(config | setting))
        with pytest.raises(ValueError, match="experts, and this one has layers without"):
            served_architecture(tmp_path)


def test_a_server_that_cannot_start_fails_with_its_logs_last_words(
    model_folder: Path, tmp_path: Path
) -> None:
    """The log is appended to, and only this start's part of it is quoted."""
    log = tmp_path / "logs" / "server-0.log"
    log.parent.mkdir()
    log.write_text("an Error of last week\n")
    wrong = dataclasses.replace(CPU, server_args=("--no-such-flag",))
    with (
        pytest.raises(ServerFailed) as caught,
        server_pool(model_folder, wrong, params_dtype="fp32", log_folder=log.parent),
    ):
        pass
    message = str(caught.value)
    assert f"log: {log}" in message
    assert "unrecognized arguments: --no-such-flag" in message
    assert "last week" not in message
    assert "\n" not in message
    assert log.read_text().startswith("an Error of last week\n\n=== 20")


def test_a_server_that_is_too_slow_is_named(model_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    server = start_server(model_folder, CPU, params_dtype="fp32", log_path=log)
    try:
        with pytest.raises(ServerFailed, match=r"not answer within 0.1 s; raise rollout.start_t"):
            wait_healthy([server], timeout_s=0.1)
        wait_healthy([server], timeout_s=60.0, should_stop=lambda: True)  # returns at once
        assert server.exit_code() is None
        children = [psutil.Process(server.process.pid)]
    finally:
        server.stop()
    assert running(children) == []
    assert not Path(server.scratch.name).exists()


def test_nothing_is_left_after_stop(server: Server, model_folder: Path, tmp_path: Path) -> None:
    """Its scheduler and detokenizer are gone too, though SGLang does not look after them yet at
    this point of their start; another server is not touched."""
    other = start_server(model_folder, CPU, params_dtype="fp32", log_path=tmp_path / "log")
    main = psutil.Process(other.process.pid)
    assert wait_until(lambda: len(main.children(recursive=True)) >= 3), last_errors(other.log_path)
    family = [main, *main.children(recursive=True)]
    other.stop()
    assert running(family) == []
    assert other.exit_code() is not None
    with pytest.raises(ServerFailed, match=r"has ended; log: "):
        other.raise_if_dead()
    server.raise_if_dead()


STARTER = """
import sys, time
from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.server import start_server
server = start_server(sys.argv[1], RolloutConfig(device="cpu"), params_dtype="fp32",
                      log_path=sys.argv[2])
print(server.process.pid, flush=True)
time.sleep(600)
"""


def test_nothing_is_left_when_the_parent_is_killed(model_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTER, str(model_folder), str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        main = psutil.Process(int(parent.stdout.readline()))
        assert wait_until(lambda: len(main.children(recursive=True)) >= 3)
        family = [main, *main.children(recursive=True)]
        assert len(running(family)) >= 4
        parent.send_signal(signal.SIGKILL)
    assert wait_until(lambda: not running(family), seconds=20.0), running(family)


GUARD = [sys.executable, "-I", guard.__file__]


def test_the_guard_starts_nothing_for_a_parent_that_is_gone() -> None:
    """Process 1 is there, but is not the parent."""
    command = [*GUARD, "1", "/bin/echo", "started"]
    answer = subprocess.run(
        command, capture_output=True, text=True, check=False, start_new_session=True
    )
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert "the parent process 1 is gone" in answer.stderr


def test_the_guard_ends_with_the_command_and_takes_all_of_it_along() -> None:
    """A command that leaves a child behind, as a crashing server does."""
    script = "sleep 600 & echo $!; exit 3"
    with subprocess.Popen(
        [*GUARD, str(os.getpid()), "/bin/sh", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        assert process.stdout.read() == "exit code 3\n"
    assert process.returncode == -signal.SIGKILL
    assert wait_until(lambda: not running([child]), seconds=10.0)


def test_the_guard_passes_a_sigterm_on() -> None:
    script = "trap 'echo told; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen(
        [*GUARD, str(os.getpid()), "/bin/sh", "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.read() == "told\nexit code 0\n"


def test_the_guard_hides_what_it_is_told_to(tmp_path: Path) -> None:
    """Also where it comes in pieces, and where the last line has no end."""
    file = tmp_path / "private.json"
    file.write_text('{"key": "open sesame"}')
    script = "printf 'say open'; sleep 0.3; printf ' sesame!\\nopen '; printf sesame >&2"
    command = [*GUARD, "--hide", str(file), str(os.getpid()), "/bin/sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert done.stdout == "say (hidden)!\n(hidden)exit code 0\n"
    assert "sesame" not in done.stdout + done.stderr


def test_a_full_disk_costs_the_log_and_not_the_command(tmp_path: Path) -> None:
    file, end = tmp_path / "private.json", tmp_path / "end"
    file.write_text('{"key": "open sesame"}')
    script = 'echo said; sleep 0.3; echo said; touch "$0"'
    command = [*GUARD, "--hide", str(file), str(os.getpid()), "/bin/sh", "-c", script, str(end)]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, start_new_session=True, timeout=60)
    assert end.exists()
    assert done.returncode == -signal.SIGKILL, "the guard lives to take all along"


def test_the_guard_keeps_up_with_a_command_that_says_much(tmp_path: Path) -> None:
    file = tmp_path / "private.json"
    file.write_text('{"key": "open sesame"}')
    script = "for i in $(seq 20000); do echo line $i of open sesame; done; exit 4"
    command = [*GUARD, "--hide", str(file), str(os.getpid()), "/bin/sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    lines = [f"line {i} of (hidden)" for i in range(1, 20001)]
    assert done.stdout.splitlines() == [*lines, "exit code 4"]


def test_a_server_is_in_a_session_of_its_own(server: Server) -> None:
    """So that the terminal's Ctrl-C reaches the trainer only."""
    assert os.getsid(server.process.pid) == server.process.pid != os.getsid(0)


def test_only_the_holder_of_the_key_is_served(server: Server) -> None:
    stranger = dataclasses.replace(server.endpoint, api_key="guess")
    with SglangClient(stranger) as client, pytest.raises(RequestRefused, match=r"with 401"):
        client.model_info()
    key, main = server.endpoint.api_key, psutil.Process(server.process.pid)
    assert len(key) > 30
    for process in [main, *main.children(recursive=True)]:
        assert key not in " ".join(process.cmdline())
    log = server.log_path.read_text(errors="replace")
    assert key not in log
    assert "(hidden)" in log, "SGLang logs its settings"
    for private in (server.log_path, Path(server.scratch.name, "server.yaml")):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600


def test_a_server_listens_on_loopback_only(server: Server) -> None:
    main = psutil.Process(server.process.pid)
    listening = [
        connection.laddr.ip
        for process in [main, *main.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) == {LOOPBACK}


def test_a_servers_environment_has_nothing_of_torchruns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("PYTHONPATH", "mine")
    on_gpu = server_environment("cuda", "Qwen3ForCausalLM", tmp_path)
    gone = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID"}
    assert not (gone | {"PYTHONDONTWRITEBYTECODE"}) & on_gpu.keys()
    assert on_gpu["CUDA_VISIBLE_DEVICES"] == "3"
    assert on_gpu["PYTHONPATH"] == "mine", "the stand-in must never shadow a GPU's kernels"
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE" not in on_gpu
    assert on_gpu["NCCL_CUMEM_ENABLE"] == "-2", "as in the ranks that the servers meet"
    monkeypatch.setenv("NCCL_CUMEM_ENABLE", "0")
    asked = server_environment("cuda", "Qwen3ForCausalLM", tmp_path)
    assert asked["NCCL_CUMEM_ENABLE"] == "0"
    on_cpu = server_environment("cpu", "Qwen3ForCausalLM", tmp_path)
    assert on_cpu["PYTHONPATH"].endswith(f"cpu_engine{os.pathsep}mine")
    assert on_cpu["MEGATRON_PREFIX_SERVED_MODEL"] == "sglang.srt.models.qwen3:Qwen3ForCausalLM"
    unknown = server_environment("cpu", "FalconForCausalLM", tmp_path)
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE" not in unknown


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_arguments_follow_the_recipe() -> None:
    rollout = RolloutConfig(server_tensor_parallel_size=2, server_args=("--log-level", "debug"))
    launch = Launch(Path("model"), "cuda", "bf16", port=7, index=3, seed=100)
    on_gpu = server_arguments(launch, rollout)
    assert option(on_gpu, "--tp-size") == "2"
    assert option(on_gpu, "--base-gpu-id") == "6"
    assert option(on_gpu, "--dtype") == "bfloat16"
    assert option(on_gpu, "--random-seed") == "103"
    assert on_gpu[-2:] == ["--log-level", "debug"]
    assert "--max-total-tokens" not in on_gpu
    assert "--attention-backend" not in on_gpu
    on_cpu = server_arguments(
        dataclasses.replace(launch, device="cpu"),
        dataclasses.replace(rollout, dtype="fp32", max_total_tokens=500),
    )
    assert option(on_cpu, "--attention-backend") == "torch_native"
    assert option(on_cpu, "--dtype") == "float32"
    assert option(on_cpu, "--max-total-tokens") == "500"
    assert "--tp-size" not in on_cpu
