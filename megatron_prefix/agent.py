"""The ranks of one node in a world of several, under torch's elastic agent:

    srun python -m megatron_prefix.agent runs/NAME/recipe.yaml --nodes 2 --ranks-per-node 8 \
        --rendezvous HEAD:PORT --id ID

torchrun is a command line for the same agent. It will not do for a job that is to be requeued: it
answers SIGTERM by killing the ranks 30 s later whatever they are saving, dies of SIGUSR1, takes a
rank that saved and ended with 75 for a failed one, and itself ends with 1.
"""

import argparse
import errno
import multiprocessing
import os
import signal
import socket
import sys
import threading
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prefix.exit_codes import DONE, FAILED, HUNG, SAVED
from megatron_prefix.health.watchdog import hang_report
from megatron_prefix.rollout.addresses import own_address
from megatron_prefix.teachers.server_files import ServerFiles, add_server_arguments, servers_of

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

# What Slurm sends before it takes the nodes away. The other signals end the ranks at once.
FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
_OTHER_SIGNALS = "SIGINT,SIGHUP,SIGQUIT"


def main() -> int:
    """The exit code of the node's ranks: 0 done, 75 saved after a signal, 1 failed."""
    arguments = _arguments()
    _block_signals()
    try:
        refuse_busy_port(arguments.rendezvous)
    except (ValueError, OSError) as error:
        print(f"megatron-prefix: error: {error}", file=sys.stderr)
        return FAILED
    threading.Thread(target=_forward, name="signals", daemon=True).start()
    # torch 2.14 keeps one store over restarts: new ranks find the addresses of dead ones in it.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # After the signals are blocked: torch may start threads, which would else take them.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    try:
        codes = elastic_launch(_config(arguments), rank_main)(
            arguments.record, servers_of(arguments)
        )
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        words = f"rank {rank} ended with exit code {failure.exitcode}"
        if failure.exitcode == HUNG:
            words = hang_report(arguments.record.parent)
        print(f"megatron-prefix: error: {words}", file=sys.stderr)
        return FAILED
    return max(codes.values())


def rank_main(record: Path, servers: ServerFiles) -> int:
    """A failure has to end the process with an error for the agent to see it; 75 is no failure.
    Restarted ranks meet at another port."""
    from megatron_prefix.worker import run_rank

    code = run_rank(record, servers)
    if code not in (DONE, SAVED):
        raise SystemExit(code)
    return code


def refuse_busy_port(rendezvous: str) -> None:
    """ValueError where HOST:PORT is this machine's and taken: torch would take whoever has it for
    the agents' store, and wait for its answer. Another machine's port is its own to check."""
    host, _, port = rendezvous.rpartition(":")
    for address in (socket.gethostbyname(host), "0.0.0.0"):  # the store listens on all
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does
            try:
                probe.bind((address, int(port)))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:
                    return
                raise ValueError(
                    f"--rendezvous {rendezvous}: {error.strerror}; start again with another port"
                ) from error


def _block_signals() -> None:
    """In this process, and in the ranks until they can answer: none is lost in between."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    # Python starts it with the first rank else, and unblocks SIGTERM then.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)


def _forward() -> None:
    """Where Slurm signals a step's first process only, the ranks hear of it from here; where it
    signals all of them, twice: for a rank that is the same."""
    while True:
        number = signal.sigwait(FORWARDED)
        for rank in multiprocessing.active_children():
            if rank.pid is not None and rank.is_alive():
                os.kill(rank.pid, number)


def _config(arguments: argparse.Namespace) -> "LaunchConfig":
    from torch.distributed.launcher.api import LaunchConfig

    return LaunchConfig(
        min_nodes=arguments.nodes,
        max_nodes=arguments.nodes,
        nproc_per_node=arguments.ranks_per_node,
        run_id=arguments.id,
        rdzv_backend="c10d",
        rdzv_endpoint=arguments.rendezvous,
        # Not this machine's full name, which its peers may know under another address.
        local_addr=own_address(arguments.rendezvous.rpartition(":")[0]),
        max_restarts=arguments.max_restarts,
        signals_to_handle=_OTHER_SIGNALS,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_prefix.agent", description="The ranks of one node."
    )
    parser.add_argument("record", type=Path, help="the run's resolved recipe.yaml")
    parser.add_argument("--nodes", type=int, required=True, help="of the world")
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--rendezvous", required=True, metavar="HOST:PORT", help="of one node")
    parser.add_argument("--id", required=True, help="the same on all nodes, of this start alone")
    parser.add_argument(
        "--max-restarts", type=int, default=0, help="of all ranks, in place, after one failed"
    )
    add_server_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
