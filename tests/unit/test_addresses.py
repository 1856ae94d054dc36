"""Files of servers' addresses: private, whole, and waited for."""

import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prefix.config import Recipe, RolloutConfig
from megatron_prefix.recipe import save_record
from megatron_prefix.rollout.addresses import (
    await_endpoints,
    own_address,
    read_endpoints,
    recipe_endpoints,
    report_lost,
    take_lost_report,
    write_endpoints,
)
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.protocol import ServerUnavailable


def endpoint(number: int) -> Endpoint:
    return Endpoint(f"http://10.0.0.{number}:30000", api_key=f"key-{number}", timeout_s=number)


def test_only_the_owner_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "servers-0.json"
    for number in (1, 2):  # an earlier file is replaced
        write_endpoints(path, [endpoint(number), endpoint(9)])
    assert read_endpoints(path) == [endpoint(2), endpoint(9)]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["servers-0.json"]


def test_every_nodes_file_is_waited_for(tmp_path: Path) -> None:
    write_endpoints(tmp_path / "servers-1.json", [endpoint(1)])
    later = threading.Timer(
        0.2, write_endpoints, (tmp_path / "servers-0.json", [endpoint(0), endpoint(2)])
    )
    later.start()
    found = await_endpoints(tmp_path, "servers", 2, timeout_s=60)
    later.join()
    assert found == [endpoint(0), endpoint(2), endpoint(1)]


def test_waiting_ends_with_a_signal_or_says_who_is_missing(tmp_path: Path) -> None:
    write_endpoints(tmp_path / "servers-1.json", [endpoint(1)])
    assert await_endpoints(tmp_path, "servers", 2, 60, should_stop=lambda: True) is None
    with pytest.raises(ServerUnavailable, match=r"1 of 2 nodes .* rollout.start_timeout_s=0"):
        await_endpoints(tmp_path, "servers", 2, 0)


def test_ranks_that_lose_a_server_at_the_same_moment_tell_its_supervisor(tmp_path: Path) -> None:
    source = tmp_path / "teacher.json"
    lost = replace(endpoint(1), source=str(source), start=3)
    with ThreadPoolExecutor(8) as ranks:
        told = list(ranks.map(lambda _: report_lost(lost, "it is gone"), range(2000)))
    assert len(told) == 2000
    assert take_lost_report(source, lost) == "it is gone"
    assert take_lost_report(source, lost) == ""
    assert list(tmp_path.iterdir()) == []


def test_servers_that_the_recipe_names(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    rollout = RolloutConfig(server_urls=("http://a:1",), api_key_file=str(tmp_path / "key"))
    assert recipe_endpoints(rollout) == [Endpoint("http://a:1", "secret", 600.0, 4)]


def test_the_address_towards_a_peer_is_one_of_ours() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"


def test_serving_every_network_is_refused(tmp_path: Path) -> None:
    record = save_record(Recipe(), tmp_path)
    command = [sys.executable, "-m", "megatron_prefix.rollout.serve", str(record)]
    command += ["--host", "0.0.0.0", "--endpoints-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "would serve every network" in done.stderr
