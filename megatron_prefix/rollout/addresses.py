"""Where servers are: those that a recipe names, and those whose starter left their addresses in
files that only their owner can read, since the keys are in there too."""

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import urlsplit

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.protocol import ServerUnavailable
from megatron_prefix.secret_keys import resolve

_POLL_S = 0.5


def recipe_endpoints(rollout: RolloutConfig) -> list[Endpoint]:
    """The servers at ``rollout.server_urls``, with the key in ``rollout.api_key_file`` or behind
    ``rollout.api_key``."""
    key = resolve("rollout.api_key", rollout.api_key)
    if rollout.api_key_file:
        key = Path(rollout.api_key_file).read_text().strip()
    return [
        Endpoint(url, key, rollout.request_timeout_s, rollout.retries)
        for url in rollout.server_urls
    ]


def write_endpoints(path: Path, endpoints: Sequence[Endpoint]) -> None:
    """Whole or not at all, with mode 600. The folder must be there."""
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        json.dump([asdict(endpoint) for endpoint in endpoints], file)
    os.replace(partial, path)


def read_endpoints(path: Path) -> list[Endpoint]:
    return [Endpoint(**entry) for entry in json.loads(path.read_text())]


def node_file(folder: Path, name: str, index: int) -> Path:
    """Where node ``index`` of those that serve leaves the addresses of its servers ``name``."""
    return folder / f"{name}-{index}.json"


def await_endpoints(
    folder: Path,
    name: str,
    nodes: int,
    timeout_s: float,
    should_stop: Callable[[], bool] = lambda: False,
    *,
    section: str = "rollout",
) -> list[Endpoint] | None:
    """The servers ``name`` of all ``nodes``, once each has left its file in ``folder``; None where
    ``should_stop`` says so first.

    Raises ServerUnavailable after ``timeout_s``, which is ``start_timeout_s`` of ``section``.
    """
    deadline = time.monotonic() + timeout_s
    files = [node_file(folder, name, index) for index in range(nodes)]
    while (there := sum(file.exists() for file in files)) < nodes:
        if should_stop():
            return None
        if time.monotonic() > deadline:
            raise ServerUnavailable(
                f"{there} of {nodes} nodes have servers that answer, after "
                f"{section}.start_timeout_s={timeout_s:g}; the logs of the others say why"
            )
        time.sleep(_POLL_S)
    return [endpoint for file in files for endpoint in read_endpoints(file)]


def own_address(peer: str, port: int = 80) -> str:
    """This machine's IPv4 address on the way to ``peer``; connecting a datagram socket sends
    nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, port))
        return str(probe.getsockname()[0])


def report_lost(endpoint: Endpoint, why: str) -> None:
    """Ask the supervisor of a server, if it has one, to start it again: in a file beside the one
    that holds its address, which names the start that is meant."""
    if not endpoint.source:
        return
    source = Path(endpoint.source)
    if not source.parent.is_dir():  # its supervisor has ended, and it too
        return
    # A name of its own: all replicas of the student lose a teacher's server at the same moment.
    descriptor, partial = tempfile.mkstemp(suffix=".telling", dir=source.parent)
    with open(descriptor, "w") as file:
        file.write(f"{endpoint.start} {why}")
    os.replace(partial, _lost_file(source, endpoint.url))


def take_lost_report(source: Path, endpoint: Endpoint) -> str:
    """Why the trainer gave this start of the server up; empty where it did not. Removes what it
    reads."""
    path = _lost_file(source, endpoint.url)
    if not path.exists():
        return ""
    start, _, why = path.read_text().partition(" ")
    path.unlink()
    return why if int(start) == endpoint.start else ""


def _lost_file(source: Path, url: str) -> Path:
    return source.with_suffix(f".{urlsplit(url).port}.lost")
