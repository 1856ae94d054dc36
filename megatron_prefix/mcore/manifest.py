"""The manifest of a checkpoint: a sum of each of its files. Files only, no weight is read.

The sums are XXH3-128: they find what disks and copies damage, for a tenth of SHA-256's CPU time
(``benchmarks/convert.py``). They prove nothing against intent, which no sum does that lies beside
its file. A manifest in SHA-256, as Megatron-Core writes with ``verify_integrity``, is read as well;
Megatron-Core 0.19.2 itself verifies no other. Where xxhash is not installed, as in an environment
that is used as it is (``GPU_PYTHON``), SHA-256 is written too.
"""

import concurrent.futures
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron_prefix.mcore.forks import OnBytes

RUN_STATE = "run_state.json"
MANIFEST = "integrity.json"  # Megatron's name and fields
_HASHES: dict[str, Callable[[], Any]] = {"sha256": hashlib.sha256}
if find_spec("xxhash"):
    import xxhash

    _HASHES = {"xxh3_128": xxhash.xxh3_128, **_HASHES}
ALGORITHM = next(iter(_HASHES))  # that is written
_READERS, _PIECE = 4, 2**19  # bytes: few enough that a piece is in the caches when it is hashed


def new_sum() -> Any:
    """For a file's bytes in their order; its ``hexdigest`` stands in the manifest."""
    return _HASHES[ALGORITHM]()


def write_manifest(
    folder: Path, known: Mapping[str, str] | None = None, on_bytes: OnBytes = lambda size: None
) -> None:
    """Of every file that is there now; those of ``known`` are not read. ``on_bytes`` is told of
    what is read, in any thread. Raises OSError."""
    sums = dict(known or {})
    names = sorted(file.name for file in folder.iterdir() if file.is_file())
    sums |= _sums(folder, [n for n in names if n not in {MANIFEST, *sums}], ALGORITHM, on_bytes)
    text = json.dumps({"algorithm": ALGORITHM, "files": dict(sorted(sums.items()))}, indent=2)
    (folder / MANIFEST).write_text(text)


def damage(folder: Path, on_bytes: OnBytes = lambda size: None) -> str:
    """What is wrong with a checkpoint by its manifest; empty where nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        algorithm, wanted = manifest["algorithm"], manifest["files"]
        if RUN_STATE not in wanted:
            return f"{MANIFEST} does not name {RUN_STATE}"
        if algorithm not in _HASHES:
            return f"{MANIFEST} has sums in {algorithm!r}; known are {', '.join(_HASHES)}"
        found = _sums(folder, list(wanted), algorithm, on_bytes)
        wrong = [name for name, digest in wanted.items() if found[name] != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return f"{', '.join(wrong)}: sum is not that of {MANIFEST}" if wrong else ""


def _sums(folder: Path, names: Sequence[str], algorithm: str, on_bytes: OnBytes) -> dict[str, str]:
    """By name. Threads: files are read and hashed outside of Python's lock."""
    with concurrent.futures.ThreadPoolExecutor(_READERS) as threads:
        sums = threads.map(lambda name: _sum(folder / name, algorithm, on_bytes), names)
        return dict(zip(names, sums, strict=True))


def _sum(path: Path, algorithm: str, on_bytes: OnBytes) -> str:
    found, piece = _HASHES[algorithm](), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while got := file.readinto(piece):
            found.update(piece[:got])
            on_bytes(got)
    return found.hexdigest()
