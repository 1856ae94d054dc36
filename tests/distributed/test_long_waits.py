"""What takes longer than a watchdog's patience and the collectives' timeout, and gets on, goes on;
what gets nowhere is found. Real ranks with real watchdogs."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_prefix.config import CheckpointConfig, TrainConfig
from megatron_prefix.exit_codes import HUNG
from megatron_prefix.health.watchdog import Watchdog, hang_report, patience
from megatron_prefix.mcore import manifest
from megatron_prefix.mcore.checkpoint import Checkpointer
from megatron_prefix.mcore.forks import OnBytes
from megatron_prefix.mcore.manifest import damage
from megatron_prefix.mcore.sealing import Tell
from megatron_prefix.mcore.step_folders import saved_steps
from megatron_prefix.orders import Order, order_group, share_order, share_words
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.teachers.loop import TeacherLoop
from megatron_prefix.teachers.server_files import FoundServers
from megatron_prefix.worker import share_servers
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import case, in_layout
from tests.distributed.world import Case, World, rollouts

__all__ = ["case"]  # the fixture
TIMEOUT_S, LONG_S = 6.0, 9.0
TICK_S = 0.2
SERVER = Endpoint("http://127.0.0.1:1")


def long(tell: Callable[[], object], seconds: float = LONG_S) -> None:
    """It gets on all the while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(TICK_S)
        tell()


def to_no_end() -> None:
    parent = os.getppid()
    while os.getppid() == parent:  # a writer that outlived its rank would hold our output open
        time.sleep(TICK_S)


def stopped() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@dataclass
class Scored:
    """In place of a teacher."""

    orders: list[int] = field(default_factory=list)

    def score(self, sampled: object, plan: object) -> None:
        self.orders.append(1)


def run(folder: Path, sample: Callable[[Tell], object]) -> int:
    """Two ranks of a student and one of a separate teacher; how many orders the last one scored.

    Rank 0 samples, and between two orders the student's ranks are at work, in phases each of which
    is shorter than the watchdogs' patience, and all together longer than the timeout.
    """
    group = order_group(timedelta(seconds=TIMEOUT_S))
    sampled = tuple(rollouts())
    with Watchdog(folder, dist.get_rank(), patience(TIMEOUT_S)) as watchdog:
        if dist.get_rank() == 2:
            teacher, train = Scored(), TrainConfig(global_batch_size=8, micro_batch_size=2)
            loop = TeacherLoop(teacher, group, train, 8, 1, watchdog)  # type: ignore[arg-type]
            assert loop.train()
            return len(teacher.orders)

        def decide() -> Order:
            sample(watchdog.goes_on)
            return Order("train", 16, sampled)

        for _ in range(2):
            watchdog.beat("order")
            with watchdog.waits_for_rank_0():
                assert share_order(decide, group).rollouts
            for phase in range(int(TIMEOUT_S) + 2):
                watchdog.beat(f"phase {phase}")
                time.sleep(1.0)
        share_order(lambda: Order("done"), group)
    return 0


def test_rank_0_may_take_its_time_over_an_order_and_the_student_between_two(tmp_path: Path) -> None:
    assert run_ranks(3, run, tmp_path, long) == [0, 0, 2]


def test_an_order_that_gets_nowhere_is_found(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"exit codes by rank: .*{HUNG}"):
        run_ranks(3, run, tmp_path, lambda tell: to_no_end())
    report = hang_report(tmp_path)
    assert "rank 0: order for" in report and "rank 2: waiting for an order for" in report
    stacks = (tmp_path / "logs" / "stacks" / "rank_0.txt").read_text()
    assert "in to_no_end" in stacks


def test_a_rank_0_that_is_stopped_is_found_by_those_that_wait(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=rf"exit codes by rank: \[None, .*{HUNG}"):
        run_ranks(3, run, tmp_path, lambda tell: stopped())
    assert "without a word, stopped or gone: rank 0" in hang_report(tmp_path)


def look_for_servers(teachers: dict[str, list[Endpoint]] | None) -> Any:
    """What a rank is told of servers that rank 0 finds after more than the ranks' timeout."""
    dist.set_timeout(timedelta(seconds=TIMEOUT_S))

    def find() -> FoundServers | None:
        time.sleep(LONG_S)
        return None if teachers is None else FoundServers([SERVER], teachers)

    return share_servers(find, TIMEOUT_S, TIMEOUT_S + 2 * LONG_S)


def test_rank_0_may_take_its_time_to_find_servers() -> None:
    told = run_ranks(2, look_for_servers, {"math": [SERVER]})
    assert told == [([SERVER], {"math": [SERVER]}), ([], {"math": [SERVER]})]
    assert run_ranks(2, look_for_servers, None) == [([], None), ([], None)]


def save_and_restore(
    case: Case,
    folder: Path,
    write: Callable[[Path], None],
    sums: Callable[[Tell], object],
) -> int:
    """The step that is restored after a save whose writer does ``write`` first, and each of whose
    files takes rank 0 ``sums`` to read, when it is saved and when it is verified."""
    world = World.build(case, dist.get_world_size())
    world.step(rollouts())
    world.student.update()
    group = order_group(timedelta(seconds=60))
    dist.barrier()
    dist.set_timeout(timedelta(seconds=TIMEOUT_S))
    read = manifest._sum

    def slow_sum(path: Path, algorithm: str, on_bytes: OnBytes) -> str:
        if path.suffix == ".distcp":
            sums(lambda: on_bytes(1))
        return read(path, algorithm, on_bytes)

    manifest._sum = slow_sum
    with Watchdog(folder, dist.get_rank(), patience(TIMEOUT_S)) as watchdog:

        def ask(act: Callable[[], str]) -> str:
            with watchdog.waits_for_rank_0():
                return share_words(act, group)

        checkpointer = Checkpointer(
            folder / "checkpoints", world.student, CheckpointConfig(), ask, watchdog.goes_on
        )
        schedule = checkpointer._queue.schedule_async_request

        def slower(request: Any) -> int:
            def before(*arguments: object, **named: object) -> None:
                if dist.get_rank() == 1:
                    write(folder / "checkpoints" / "step_00000001.partial")
                request.async_fn(*arguments, **named)

            return schedule(request._replace(async_fn=before))

        checkpointer._queue.schedule_async_request = slower  # type: ignore[method-assign]
        watchdog.beat("save")
        checkpointer.save(1, {"layout": checkpointer.layout_record()}, wait=True)
        watchdog.beat("restore")
        restored = checkpointer.restore()
    assert restored is not None
    return restored.step


def grows(partial: Path) -> None:
    with (partial / "shard").open("ab", buffering=0) as file:
        long(lambda: file.write(b"0"))


def test_a_save_that_is_waited_for_may_take_its_time_and_so_may_its_proof(
    case: Case, tmp_path: Path
) -> None:
    case = in_layout(case, 2, 1)
    assert run_ranks(2, save_and_restore, case, tmp_path, grows, long) == [1, 1]
    (saved,) = saved_steps(tmp_path / "checkpoints")
    assert damage(saved) == ""


@pytest.mark.parametrize(
    ("write", "sums", "doing"),
    [
        (lambda partial: to_no_end(), lambda tell: None, "save"),
        (lambda partial: None, lambda tell: to_no_end(), "save"),
    ],
    ids=["written", "read"],
)
def test_a_save_that_gets_nowhere_is_found(
    case: Case, tmp_path: Path, write: object, sums: object, doing: str
) -> None:
    with pytest.raises(RuntimeError, match=f"exit codes by rank: .*{HUNG}"):
        run_ranks(2, save_and_restore, in_layout(case, 2, 1), tmp_path, write, sums)
    assert f"rank 0: {doing} for" in hang_report(tmp_path)
