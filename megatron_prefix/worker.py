"""What a rank runs, under our launcher, our agent or torchrun, which say which rank it is:

    torchrun --nproc-per-node 8 -m megatron_prefix.worker runs/NAME/recipe.yaml

Without ``--endpoints`` the servers are those at the recipe's ``rollout.server_urls``.
"""

import argparse
import gc
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from megatron_prefix.config import Recipe
from megatron_prefix.exit_codes import DONE, FAILED, PORT_TAKEN, SAVED
from megatron_prefix.orders import order_group
from megatron_prefix.recipe import load_record
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.run_files.log import setup_logging
from megatron_prefix.teachers.server_files import (
    FoundServers,
    ServerFiles,
    add_server_arguments,
    longest_look_s,
    servers_of,
)

logger = logging.getLogger("megatron_prefix.worker")  # this file runs as __main__
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class PortTaken(RuntimeError):
    """Somebody took the port that the ranks were told to meet at, before rank 0 came to it."""


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1; looked at between steps."""

    def __init__(self) -> None:
        self.signal = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self._set)
        # The agent starts ranks with them blocked: one that came since is taken now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def _set(self, number: int, _: FrameType | None) -> None:
        self.signal = number

    def __call__(self) -> bool:
        return self.signal != 0


def main() -> int:
    arguments = _arguments()
    return run_rank(arguments.record, servers_of(arguments))


def run_rank(record: Path, servers: ServerFiles) -> int:
    """The exit code: 0 done, 75 saved after a signal, 1 failed."""
    stop = StopFlag()
    recipe = load_record(record)
    rank = int(os.environ["RANK"])
    # torch warns on stderr that nvcc is there and a GPU is not: true, and of no use to anyone.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    folder = Path(recipe.run.output_dir, recipe.run.name)
    setup_logging(folder, rank)
    try:
        servers.check(recipe)
        return _train(recipe, folder, servers, stop)
    except PortTaken as error:
        logger.error("%s", error)
        return PORT_TAKEN
    except (RuntimeError, ValueError, OSError) as error:
        logger.debug("traceback", exc_info=True)
        logger.error("%s: %s", type(error).__name__, error, exc_info=rank != 0)
        return FAILED


def _train(recipe: Recipe, folder: Path, servers: ServerFiles, stop: StopFlag) -> int:
    from megatron_prefix.mcore.cpu import adapt_to_cpu

    adapt_to_cpu()  # before anything of Megatron is imported
    from megatron_prefix.assemble import assemble

    if os.environ["RANK"] == "0":  # for its tokenizer: now, and not while the others wait for it
        importlib.import_module("transformers")
    started_s = time.time() - psutil.Process().create_time()
    logger.info("the rank took %.1f s to start", started_s)
    _join_world(recipe)
    limit_s = recipe.run.distributed_timeout_s
    longest_s = limit_s + longest_look_s(recipe)
    rollouts, teachers = share_servers(lambda: servers.find(recipe, stop), limit_s, longest_s)
    if teachers is None:  # a signal came first; nothing is lost
        dist.destroy_process_group()
        return SAVED
    with assemble(recipe, folder, rollouts, stop, teachers) as share:
        keep_out_of_collections()
        finished = share.train()
    dist.barrier()
    dist.destroy_process_group()
    return DONE if finished else SAVED


def share_servers(
    find: Callable[[], FoundServers | None], timeout_s: float, longest_s: float
) -> tuple[list[Endpoint], Mapping[str, list[Endpoint]] | None]:
    """Those of the rollouts, on rank 0, which alone talks to them and alone looks for servers; and
    those of the teachers by domain, on every rank: None where ``find`` found nothing.

    The ranks meet within ``timeout_s``, and the others wait ``longest_s`` for it. Collective.
    """
    group = order_group(timedelta(seconds=timeout_s), timedelta(seconds=longest_s))
    found = find() if dist.get_rank() == 0 else None
    teachers = [found.teachers if found else None]
    dist.broadcast_object_list(teachers, src=0, group=group)
    return (found.rollouts if found else []), teachers[0]


def keep_out_of_collections() -> None:
    """What was imported and built so far stays: a full collection, which each of Megatron's saves
    asks for within the training loop, need not walk over its million objects."""
    gc.collect()
    gc.freeze()


def _join_world(recipe: Recipe) -> None:
    """Raises PortTaken on rank 0, which is to listen there."""
    timeout = timedelta(seconds=recipe.run.distributed_timeout_s)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise PortTaken(f"{address}, where the ranks were to meet, is in use") from error


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_prefix.worker", description="One rank of a run."
    )
    parser.add_argument("record", type=Path, help="the run's resolved recipe.yaml")
    add_server_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
