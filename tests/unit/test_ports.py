"""A port that somebody holds: another one is taken, or one line says so."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prefix.agent import refuse_busy_port
from megatron_prefix.config import Recipe
from megatron_prefix.exit_codes import PORT_TAKEN
from megatron_prefix.jobs.cluster import Cluster, setup_lines
from megatron_prefix.launcher import KILLED, _end_all
from megatron_prefix.worker import PortTaken, _join_world

SCRIPTS = Path(__file__).parents[2] / "slurm"
FIRST, PORTS = 20000, 12000


def lines_of(script: str) -> str:
    """The part of a batch script that chooses a port, and says which."""
    found = re.search(r"[a-z_]*port=\$\(\(20000 .*?done\n", script, flags=re.DOTALL)
    assert found, script
    chosen = re.match(r"[a-z_]+", found[0])
    assert chosen
    return f"{found[0]}echo ${chosen[0]}"


CHOOSING = {
    "sbatch": lines_of((SCRIPTS / "multi_node.sbatch").read_text()),
    "nemo-run": lines_of(setup_lines(Path("runs/x/recipe.yaml"), Cluster(nodes=2))),
}


@pytest.fixture(params=["127.0.0.1", "0.0.0.0", "::"])
def held(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port of those that jobs choose from, with a listener."""
    family = socket.AF_INET6 if ":" in request.param else socket.AF_INET
    with socket.socket(family) as listener:
        for port in range(FIRST, FIRST + PORTS):
            try:
                listener.bind((request.param, port))
            except OSError:
                continue
            listener.listen()
            yield port
            return
    raise AssertionError("no port is free")


@pytest.mark.parametrize("name", CHOOSING)
def test_a_job_takes_the_next_port_where_its_own_is_held(name: str, held: int) -> None:
    def chosen(job: int) -> int:
        done = subprocess.run(
            ["bash", "-c", CHOOSING[name]], env={"SLURM_JOB_ID": str(job)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return int(done.stdout)

    assert chosen(held - FIRST) > held
    assert chosen(held - FIRST + 7 * PORTS) > held
    free = next(port for port in range(held + 1, FIRST + PORTS) if is_free(port))
    assert chosen(free - FIRST) == free


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def test_an_agent_says_that_its_port_is_held(held: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megatron_prefix.agent", str(tmp_path / "recipe.yaml")]
    command += ["--nodes", "2", "--ranks-per-node", "1", "--id", "1"]
    command += ["--rendezvous", f"127.0.0.1:{held}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"--rendezvous 127.0.0.1:{held}: Address already in use" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_free_port_and_another_machines_are_let_pass(held: int) -> None:
    refuse_busy_port(f"127.0.0.1:{next(p for p in range(held + 1, FIRST + PORTS) if is_free(p))}")
    refuse_busy_port(f"192.0.2.1:{held}")  # an address that nobody has (RFC 5737)
    with pytest.raises(ValueError, match="start again with another port"):
        refuse_busy_port(f"127.0.0.1:{held}")


def test_rank_0_says_that_the_ranks_port_is_held(
    held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": held}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(PortTaken, match=f"127.0.0.1:{held}, where the ranks were to meet, is in"):
        _join_world(Recipe())


@pytest.mark.parametrize(("code", "again"), [(PORT_TAKEN, True), (1, False)])
def test_ranks_start_again_at_another_port(code: int, again: bool) -> None:
    rank = subprocess.Popen(
        [sys.executable, "-c", f"raise SystemExit({code})"], start_new_session=True
    )
    rank.wait()
    assert (_end_all([rank], "a test") == KILLED) == again
