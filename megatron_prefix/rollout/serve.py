"""The SGLang servers of one node, for trainers on other nodes. A Slurm step runs it on each node:

    python -m megatron_prefix.rollout.serve runs/NAME/recipe.yaml --peer TRAINER --endpoints-dir DIR

Once they answer, DIR/servers-INDEX.json has their addresses and their random keys, with mode 600.
That file is a lease: the servers end when it is removed, or DIR with it. SIGTERM and SIGUSR1 do
not end them, since Slurm sends these to every step of a job, and the trainer may have to sample to
the end of its step before it can save.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_prefix.config import Recipe, RolloutConfig
from megatron_prefix.exit_codes import DONE, FAILED
from megatron_prefix.recipe import load_record
from megatron_prefix.rollout.addresses import node_file, own_address
from megatron_prefix.rollout.server import Server, ServerFailed, start_server, wait_healthy
from megatron_prefix.rollout.supervisor import Supervisor

# Blocked, not ignored: SGLang would put handlers of its own in place.
_FOR_THE_TRAINER = (signal.SIGTERM, signal.SIGUSR1)
_POLL_S = 0.5
ROLLOUTS = "servers"  # their files' name


@dataclass(frozen=True)
class Group:
    """Servers of one model; their lease has its name from ``name``."""

    name: str
    settings: RolloutConfig
    supervisor: Supervisor  # which has started none yet


def main() -> int:
    """The exit code: 0 when the lease is over, 1 when a server could not start or ended."""
    return serving("megatron_prefix.rollout.serve", "The servers of one node.", _rollouts)


def serving(
    module: str, description: str, groups: Callable[[Recipe, str, int], Sequence[Group]]
) -> int:
    """A step's process, of ``groups`` of the recipe, this node's address and its index."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINER)  # the servers inherit it
    arguments = _arguments(module, description)
    try:
        recipe = load_record(arguments.record)
        host = arguments.host or own_address(arguments.peer)
        _check_host(host)
        index = arguments.index
        serve(groups(recipe, host, index), arguments.endpoints_dir, index)
    except (ServerFailed, ValueError, OSError) as error:
        print(f"megatron-prefix serve: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return DONE
    return DONE


def serve(groups: Sequence[Group], endpoints_dir: Path, index: int) -> None:
    """Servers until the lease is over; ``index`` is this node's among those that serve.

    Servers that end, or that the trainer gives up, are started again. Raises ServerFailed when one
    does not start in time, or when none of a group is left.
    """
    leases = [node_file(endpoints_dir, group.name, index) for group in groups]
    try:
        servers = [
            group.supervisor.add() for group in groups for _ in range(group.settings.num_servers)
        ]
        timeout_s = max(group.settings.start_timeout_s for group in groups)
        wait_healthy(servers, timeout_s=timeout_s, should_stop=lambda: not endpoints_dir.is_dir())
        if not endpoints_dir.is_dir():  # the trainer ended before the servers had started
            return
        for group, lease in zip(groups, leases, strict=True):
            group.supervisor.publish(lease)
        print(f"serving at {', '.join(server.url for server in servers)}", flush=True)
        while all(lease.exists() for lease in leases):
            for group in groups:
                group.supervisor.poll()
            time.sleep(_POLL_S)
    finally:
        for group in groups:
            group.supervisor.stop()


def _rollouts(recipe: Recipe, host: str, index: int) -> Sequence[Group]:
    supervisor = Supervisor(partial(_start, recipe, host, index), recipe.rollout)
    return [Group(ROLLOUTS, recipe.rollout, supervisor)]


def _start(recipe: Recipe, host: str, node: int, index: int, port: int, api_key: str) -> Server:
    logs = Path(recipe.run.output_dir, recipe.run.name, "logs", f"servers-{node}")
    return start_server(
        recipe.student.hf_path,
        recipe.rollout,
        params_dtype=recipe.student.params_dtype,
        log_path=logs / f"server-{index}.log",
        index=index,
        port=port,
        seed=recipe.train.seed + node * recipe.rollout.num_servers,
        host=host,
        api_key=api_key,
        first_gpu=max(recipe.rollout.first_gpu, 0),  # no rank is on this node
    )


def _check_host(host: str) -> None:
    if host in ("0.0.0.0", "::", "*"):
        raise ValueError(
            f"--host {host} would serve every network of this machine; give the address that the "
            "trainers reach it by, or --peer with the name of a trainer's node"
        )


def _arguments(module: str, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("record", type=Path, help="the run's resolved recipe.yaml")
    address = parser.add_mutually_exclusive_group(required=True)
    address.add_argument("--host", help="the address to serve at")
    address.add_argument("--peer", help="serve at the address that this node has towards PEER")
    parser.add_argument("--endpoints-dir", type=Path, required=True, help="a folder that is there")
    parser.add_argument(
        "--index",
        type=int,
        default=int(os.environ.get("SLURM_PROCID", "0")),
        help="of this node among those that serve; SLURM_PROCID where it is set",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
