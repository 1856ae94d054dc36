"""A rich progress bar over bytes."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextlib.contextmanager
def byte_progress(label: str, total: int, *, show: bool = True) -> Iterator[Callable[[int], None]]:
    """Gives a function to be told of bytes done; on standard error, so that results can be piped.
    Without ``show`` nothing is drawn."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    rest = (TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, *rest, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task(label, total=total)
        yield lambda size: progress.advance(task, size)
