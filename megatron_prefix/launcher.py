"""One machine: starts SGLang servers and Megatron ranks, watches them, and leaves none behind."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

from megatron_prefix import die_with_parent
from megatron_prefix.config import Recipe
from megatron_prefix.exit_codes import DONE, FAILED, HUNG, PORT_TAKEN, SAVED
from megatron_prefix.health.watchdog import hang_found, hang_report
from megatron_prefix.jobs.cluster import Cluster
from megatron_prefix.jobs.starts import note_end, note_this_process
from megatron_prefix.modes import check_own_servers, needs_servers, section_of, started_teachers
from megatron_prefix.placement import WorldLayout, resolve_world_size, world_layout
from megatron_prefix.recipe import check_run_folder, save_record
from megatron_prefix.rollout.addresses import recipe_endpoints, write_endpoints
from megatron_prefix.rollout.cards import first_server_gpu, gpus_here
from megatron_prefix.rollout.command import resolve_device
from megatron_prefix.rollout.server import (
    Server,
    ServerFailed,
    free_port,
    start_server,
    wait_healthy,
)
from megatron_prefix.rollout.supervisor import Supervisor
from megatron_prefix.teachers.serve import teacher_supervisor
from megatron_prefix.teachers.served import endpoints_file

POLL_S = 0.1
KILLED = -1  # no exit code of ours: a rank was killed, or hung
GRACE_S = 20.0  # a failing run's other ranks get this long before SIGKILL


def launch_local(recipe: Recipe) -> int:
    """Run ``recipe`` on this machine to its end; returns the exit code.

    A first SIGINT, SIGTERM or SIGUSR1 lets the ranks save and stop; a second one kills them.
    Servers that end are started again, and so are all ranks, from the newest whole checkpoint,
    where one was killed or hung: ``run.max_restarts`` times.
    """
    folder = Path(recipe.run.output_dir, recipe.run.name)
    check_run_folder(folder, recipe)
    check_own_servers(recipe, Cluster().servers(recipe.rollout))
    record = save_record(recipe, folder)
    with _count_signals() as stops:
        start, code = note_this_process(folder), FAILED
        try:
            code = _run(recipe, record, stops)
        finally:
            note_end(folder, start, code)
    return code


def _run(recipe: Recipe, record: Path, stops: list[int]) -> int:
    folder = record.parent
    with contextlib.ExitStack() as stack:
        supervisor = _start_servers(recipe, folder, stack)
        teachers = _start_teachers(recipe, folder, stack)
        endpoints = stack.enter_context(_endpoints_file(recipe, supervisor, teachers))
        arguments = [str(record), "--endpoints", str(endpoints)]
        arguments += ["--teacher-endpoints", str(endpoints.parent)]
        try:
            _wait_if_gpus_are_shared(recipe, supervisor, lambda: bool(stops))
        except ServerFailed as error:
            print(f"megatron-prefix: error: {error}", file=sys.stderr, flush=True)
            return FAILED
        for restarts_left in reversed(range(recipe.run.max_restarts + 1)):
            with contextlib.ExitStack() as ranks_stack:
                ranks = [
                    _start_rank(rank, settings, arguments, folder, ranks_stack)
                    for rank, settings in enumerate(_rank_settings(recipe))
                ]
                hung = partial(hang_found, folder, time.time())
                why = partial(_why, folder, world_layout(recipe, len(ranks)))
                code = _watch(ranks, [supervisor, *teachers.values()], stops, why, hung)
            if code != KILLED or stops or not restarts_left:
                return FAILED if code == KILLED else code
            print(
                f"megatron-prefix: the ranks start again; {restarts_left - 1} more times if need "
                "be (run.max_restarts)",
                file=sys.stderr,
                flush=True,
            )
        raise AssertionError("the last start returns")


def _start_servers(recipe: Recipe, folder: Path, stack: contextlib.ExitStack) -> Supervisor:
    """Our own servers, starting; none where the recipe names running ones or asks none."""

    def start(index: int, port: int, api_key: str) -> Server:
        return start_server(
            recipe.student.hf_path,
            recipe.rollout,
            params_dtype=recipe.student.params_dtype,
            log_path=folder / "logs" / f"server-{index}.log",
            index=index,
            port=port,
            seed=recipe.train.seed,
            api_key=api_key,
            first_gpu=_first_gpu(recipe),
        )

    ours = needs_servers(recipe) and not recipe.rollout.server_urls
    return _supervise(Supervisor(start, recipe.rollout), recipe.rollout.num_servers * ours, stack)


def _first_gpu(recipe: Recipe) -> int:
    if resolve_device(recipe.rollout.device) != "cuda":  # no GPU to count, and no torch to import
        return 0
    return first_server_gpu(recipe.rollout, resolve_world_size(recipe), gpus_here())


def _wait_if_gpus_are_shared(
    recipe: Recipe, supervisor: Supervisor, should_stop: Callable[[], bool]
) -> None:
    """A server takes its share of what it finds free: on the ranks' GPUs it comes first."""
    on_gpus = supervisor.servers and resolve_device(recipe.rollout.device) == "cuda"
    if on_gpus and _first_gpu(recipe) < resolve_world_size(recipe):
        timeout_s = recipe.rollout.start_timeout_s
        wait_healthy(supervisor.servers, timeout_s=timeout_s, should_stop=should_stop)


def _start_teachers(
    recipe: Recipe, folder: Path, stack: contextlib.ExitStack
) -> dict[str, Supervisor]:
    """Of each teacher that is behind servers, by domain: those that we start for it."""
    return {
        domain: _start_teacher(recipe, domain, folder, stack) for domain in started_teachers(recipe)
    }


def _start_teacher(
    recipe: Recipe, domain: str, folder: Path, stack: contextlib.ExitStack
) -> Supervisor:
    section = section_of(domain)
    supervisor = teacher_supervisor(recipe, domain, str(folder / "logs" / f"{section}-server"))
    count = started_teachers(recipe)[domain].server.num_servers
    return _supervise(supervisor, count, stack, f" of {section}")


def _supervise(
    supervisor: Supervisor, count: int, stack: contextlib.ExitStack, whose: str = ""
) -> Supervisor:
    stack.callback(supervisor.stop)
    for _ in range(count):
        server = supervisor.add()
        words = f"starting an SGLang server{whose} at {server.url}; log: {server.log_path}"
        print(words, flush=True)
    return supervisor


@contextlib.contextmanager
def _endpoints_file(
    recipe: Recipe, supervisor: Supervisor, teachers: Mapping[str, Supervisor]
) -> Iterator[Path]:
    """URLs and keys for rank 0, in a file that only this user can read, and beside it those of
    teachers' servers."""
    with tempfile.TemporaryDirectory(prefix="megatron-prefix-") as folder:
        path = Path(folder, "endpoints.json")
        if supervisor.servers:
            supervisor.publish(path)
        else:
            write_endpoints(path, recipe_endpoints(recipe.rollout))
        for domain, servers in teachers.items():
            servers.publish(endpoints_file(Path(folder), domain))
        yield path


def _rank_settings(recipe: Recipe) -> list[dict[str, str]]:
    """The environment of each rank, as torchrun would set it."""
    count = resolve_world_size(recipe)
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _start_rank(
    rank: int,
    settings: dict[str, str],
    arguments: Sequence[str],
    folder: Path,
    stack: contextlib.ExitStack,
) -> subprocess.Popen[bytes]:
    """A rank in a session of its own: a terminal's Ctrl-C reaches us alone, and we tell the ranks.

    Rank 0 writes to our own output, the others to ``logs/rank_N.out``.
    """
    environment = {**os.environ, **settings}
    # Without bytecode each start compiles all of torch and Megatron anew.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    output = None
    if rank:
        path = folder / "logs" / f"rank_{rank}.out"
        path.parent.mkdir(parents=True, exist_ok=True)
        output = stack.enter_context(path.open("ab"))
    process = subprocess.Popen(
        # -P: this package has a types.py, which must not pass for Python's.
        [sys.executable, "-P", die_with_parent.__file__, str(os.getpid()), sys.executable]
        + ["-m", "megatron_prefix.worker", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
    )
    stack.callback(_kill, process)
    return process


def _watch(
    ranks: Sequence[subprocess.Popen[bytes]],
    supervisors: Sequence[Supervisor],
    stops: list[int],
    why: Callable[[int, int | None], str],
    hung: Callable[[], bool],
) -> int:
    """Until all ranks have ended: their exit code, or KILLED. One that fails ends the others; so
    does the last server's end."""
    told = False
    while True:
        if hung():  # one that was stopped goes on, to write its stacks while the others are there
            _signal(ranks, signal.SIGCONT)
        codes = [rank.poll() for rank in ranks]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, DONE, SAVED)]
        if failed:
            return _end_all(ranks, why(failed[0], codes[failed[0]]))
        if None not in codes:
            return SAVED if SAVED in codes else DONE
        try:
            for supervisor in supervisors:
                supervisor.poll()
        except ServerFailed as error:
            return _end_all(ranks, str(error))
        if len(stops) > 1:
            return _end_all(ranks, "stopped at once by a second signal", grace_s=0.0)
        if stops and not told:
            told = True
            print("stopping: the ranks save and end; once more to stop at once", file=sys.stderr)
            _signal(ranks, signal.SIGTERM)
        time.sleep(POLL_S)


def _signal(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        rank.send_signal(number)


def _why(folder: Path, world: WorldLayout, rank: int, code: int | None) -> str:
    if code == HUNG:
        return hang_report(folder)
    owner = "" if rank in world.student.ranks else ", of the teacher,"
    return f"rank {rank}{owner} ended with exit code {code}"


def _end_all(
    ranks: Sequence[subprocess.Popen[bytes]], reason: str, grace_s: float = GRACE_S
) -> int:
    """Give the other ranks a moment to end by themselves (their collectives fail), then kill.

    Returns KILLED where the next start may go well: a signal ended one of them, or its watchdog, or
    the port where they were to meet was taken.
    """
    print(f"megatron-prefix: error: {reason}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(POLL_S)
    codes = [rank.poll() for rank in ranks]
    for rank in ranks:
        _kill(rank)
    return (
        KILLED if any(code in (HUNG, PORT_TAKEN) or (code or 0) < 0 for code in codes) else FAILED
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The rank and what it forked (checkpoint writers)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _count_signals() -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGUSR1 are counted instead of ending this process."""
    seen: list[int] = []

    def count(number: int, _: FrameType | None) -> None:
        seen.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, count) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
