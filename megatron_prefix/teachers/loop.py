"""What a rank of a separate teacher does all run long: it follows rank 0's orders."""

import torch.distributed as dist

from megatron_prefix.batch import as_teacher_reads
from megatron_prefix.config import TrainConfig
from megatron_prefix.health.watchdog import NoWatchdog, Watchdog
from megatron_prefix.orders import Order, microbatches, share_order
from megatron_prefix.teacher import TeacherRank


class TeacherLoop:
    """Stands where the student's ranks have a ``Trainer``. It holds no state of the run, so that
    checkpoints are the student's alone and load with the teacher anywhere."""

    def __init__(
        self,
        teacher: TeacherRank,
        host_group: dist.ProcessGroup,
        train: TrainConfig,
        token_multiple: int,
        student_replicas: int,
        watchdog: Watchdog | NoWatchdog,
    ) -> None:
        self._teacher, self._host_group, self._train = teacher, host_group, train
        self._packing, self._watchdog = (token_multiple, student_replicas), watchdog

    def train(self) -> bool:
        """Score what each order holds; True where the run is done, False where a signal ended it.
        From one order to the next the student's ranks may save, evaluate and sample: how long each
        of these takes is for their watchdogs to judge.

        RuntimeError with rank 0's words where that one failed.
        """
        stopped = False
        while True:
            self._watchdog.beat("waiting for an order")
            with self._watchdog.waits_for_rank_0():
                order = share_order(_not_here, self._host_group)
            if order.kind == "done":
                return not stopped
            stopped = stopped or order.kind == "save_and_stop"  # and the save is still to come
            if order.rollouts and not order.supervised:
                self._watchdog.beat("teacher")
                plan = microbatches(order, self._train, *self._packing)
                self._teacher.score(*as_teacher_reads(order.rollouts, plan))


def _not_here() -> Order:
    raise AssertionError("rank 0 is the student's")
