"""Which processes live, and the wait for what other processes do."""

import os
import time
from collections.abc import Callable
from pathlib import Path


def children_of(name: str) -> list[str]:
    """Command lines of living processes that mention ``name``."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:  # it ended meanwhile
                continue
            if name in words:
                found.append(words)
    return found


def wait_until(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()
