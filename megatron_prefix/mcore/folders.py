"""Output folders that are whole or not there: written beside their place and renamed into it."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

PARTIAL, OLD = ".partial", ".old"


def start_folder(final: Path) -> Path:
    """An empty folder beside ``final`` to write into; ``final`` itself is left alone.

    What an earlier writer that was killed left is cleared: a half-written folder is removed, and an
    old ``final`` that had been moved aside and not replaced is put back.
    """
    partial, old = final.with_name(final.name + PARTIAL), final.with_name(final.name + OLD)
    shutil.rmtree(partial, ignore_errors=True)
    if old.exists() and not final.exists():
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_folder(final: Path) -> None:
    """Put what was written for ``final`` in its place. At every moment either the old or the new
    folder is whole on the disk."""
    put_in_place(final.with_name(final.name + PARTIAL), final, final.with_name(final.name + OLD))


def put_in_place(partial: Path, final: Path, old: Path) -> None:
    """``partial`` becomes ``final``; one that was there waits as ``old`` until it has."""
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def leftovers(final: Path) -> list[str]:
    """Names beside ``final`` that a killed writer left."""
    beside = (final.with_name(final.name + end) for end in (PARTIAL, OLD))
    return [path.name for path in beside if path.exists()]


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Gives a folder to write into, which takes ``final``'s place at the end. After an error it is
    removed, which gives a full disk back."""
    partial = start_folder(final)
    try:
        yield partial
        finish_folder(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
