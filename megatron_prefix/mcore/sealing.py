"""The last acts of a save: sums, the final name, retention. Files only, on one rank.

They run beside the training loop: for its sums a checkpoint is read once more, all of it.
"""

import concurrent.futures
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from megatron_prefix.config import CheckpointConfig
from megatron_prefix.mcore.folders import to_disk
from megatron_prefix.mcore.manifest import MANIFEST, RUN_STATE, write_manifest
from megatron_prefix.mcore.step_folders import (
    drop,
    put_in_place,
    saved_steps,
    step_folder,
    step_of,
    steps_to_drop,
)

logger = logging.getLogger(__name__)
Tell = Callable[[], object]  # is called again and again, in any thread, while bytes are read
_LOOK_S = 0.2  # between two looks whether bytes were read


class Sealing:
    """Of one checkpoint, begun; a process that ends by itself waits for it."""

    def __init__(self, partial: Path, final: Path, config: CheckpointConfig) -> None:
        executor = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="sealing")
        self._got_on = threading.Event()
        self._future = executor.submit(seal, partial, final, config, self._got_on.set)
        executor.shutdown(wait=False)

    def done(self) -> bool:
        return self._future.done()

    def problem(self, goes_on: Tell = lambda: None) -> str:
        """Waits for the end: why the checkpoint is not whole, empty where it is. ``goes_on`` is
        called meanwhile, as long as bytes are read."""
        while not concurrent.futures.wait([self._future], _LOOK_S).done:
            if self._got_on.is_set():
                self._got_on.clear()
                goes_on()
        return self._future.result()


def seal(partial: Path, final: Path, config: CheckpointConfig, tell: Tell = lambda: None) -> str:
    """``partial``, all written, becomes ``final``, and older checkpoints go; why that cannot be.

    Nothing older goes before ``final`` is on the disk: a node may lose its power at any moment.
    """
    try:
        if config.verify_integrity:
            write_manifest(partial, on_bytes=lambda size: tell())
            to_disk(partial / MANIFEST)
        to_disk(partial / RUN_STATE)
        to_disk(partial)
        put_in_place(partial, final)
        to_disk(final.parent)
        logger.info("checkpoint %s is whole", final.name)
        tell()
        retain(final, config)
    except OSError as error:
        return " ".join(str(error).split())
    return ""


def retain(newest: Path, config: CheckpointConfig) -> None:
    """Remove what ``checkpoint.keep_last`` and ``keep_every`` leave no reason to keep."""
    folder = newest.parent
    steps = [step_of(saved) for saved in saved_steps(folder)]
    for step in steps_to_drop(steps, step_of(newest), config.keep_last, config.keep_every):
        drop(step_folder(folder, step))
