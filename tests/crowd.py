"""A process that hardly comes to run: its main thread has one core, with many others beside it."""

import contextlib
from collections.abc import Iterator

import psutil

_BURNING = 30


@contextlib.contextmanager
def crowded(process: psutil.Process) -> Iterator[None]:
    """Until the end of the block; the others never rest."""
    cores = process.cpu_affinity()
    assert cores
    burning: list[psutil.Popen] = []
    try:
        process.cpu_affinity(cores[-1:])
        for _ in range(_BURNING):
            # Where the kernel shares out time by session, each has as much as the process.
            words = ["sh", "-c", "while :; do :; done"]
            burning.append(psutil.Popen(words, start_new_session=True))
            burning[-1].cpu_affinity(cores[-1:])
        yield
    finally:
        for each in burning:
            each.kill()
            each.wait()
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            process.cpu_affinity(cores)
