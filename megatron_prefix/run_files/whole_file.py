"""Files that a reader finds whole or not at all, whenever their writer dies."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, which takes ``path``'s name at the end of the block.

    Until then, and after an error, ``path`` is as it was. For one writer at a time. The mode is
    the umask's: a file with a secret is opened by hand (``rollout/addresses.py``).
    """
    fresh = path.with_name(f"{path.name}.new")
    try:
        yield fresh
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
