"""Output folders that are whole or not there: written beside their place and renamed into it."""

import contextlib
import fcntl
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

PARTIAL, OLD, LOCK = ".partial", ".old", ".lock"


@contextlib.contextmanager
def new_folder(final: Path, *, durable: bool = True) -> Iterator[Path]:
    """Gives an empty folder beside ``final`` to write into, which takes ``final``'s place at the
    end. After an error it is removed, which gives a full disk back.

    With ``durable`` all of it is on the disk before the old ``final`` goes: a machine may lose its
    power at any moment.

    What an earlier writer that was killed left is cleared: a half-written folder is removed, and an
    old ``final`` that had been moved aside and not replaced is put back. ValueError where another
    writer of ``final`` lives.
    """
    with _only_writer(final):
        partial = _start_folder(final)
        try:
            yield partial
            if durable:
                for path in (*partial.rglob("*"), partial):
                    to_disk(path)
            put_in_place(partial, final, _beside(final, OLD))
            if durable:
                to_disk(final.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _start_folder(final: Path) -> Path:
    partial, old = _beside(final, PARTIAL), _beside(final, OLD)
    shutil.rmtree(partial, ignore_errors=True)
    if old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    partial.mkdir()
    return partial


def put_in_place(partial: Path, final: Path, old: Path) -> None:
    """``partial`` becomes ``final``; one that was there waits as ``old`` until it has, so that at
    every moment either is whole on the disk."""
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def to_disk(path: Path) -> None:
    """A file's content, or a folder's names, whoever wrote them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leftovers(final: Path) -> list[str]:
    """Names beside ``final`` that a killed writer left; ValueError where it is not dead."""
    if _beside(final, LOCK).exists():
        with _only_writer(final):
            pass
    beside = (_beside(final, end) for end in (PARTIAL, OLD))
    return [path.name for path in beside if path.exists()]


def _beside(final: Path, end: str) -> Path:
    return final.with_name(final.name + end)


@contextlib.contextmanager
def _only_writer(final: Path) -> Iterator[None]:
    """Holds a lock beside ``final``, which the kernel drops when the last process that has it dies:
    this one, or one that it forked to write with it."""
    path = _beside(final, LOCK)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(path, final)
    try:
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there was none
            # Closing alone would leave it to processes that were forked meanwhile.
            fcntl.flock(file, fcntl.LOCK_UN)
        file.close()


def _lock(path: Path, final: Path) -> IO[str]:
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            writer = file.read() or "another process"
            file.close()
            raise ValueError(
                f"{final} is being written by {writer}; wait for its end or name another"
            ) from error
        except OSError as error:  # as Lustre without its mount option
            logger.warning("%s: no lock (%s); start no other run that writes it", path, error)
        if _lies_at(file, path):
            file.truncate(0)
            return file
        file.close()  # its last holder removed it between the two calls


def _lies_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
