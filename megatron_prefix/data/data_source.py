"""Rows of a data set through ``datasets``: files, folders, hub ids, in a seeded, resumable order.

Row numbers count from 0 in the data set's own order. Every error of a user's data is a
``ValueError`` of one line that names the setting, the file and, for broken JSON, the line.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from megatron_prefix.config import DataConfig

if TYPE_CHECKING:
    import datasets

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
STREAM_BLOCK = 4096  # rows that a streamed set shuffles among themselves

Row = dict[str, Any]


class RowSource(Protocol):
    """A data set that can be read again and again, from any point of any pass."""

    @property
    def num_rows(self) -> int:
        """Rows of the set; 0 where it is streamed and their number is not known."""

    def read(self, epoch: int, start: int) -> Iterator[tuple[int, Row]]:
        """Row numbers and rows of a pass in its order, from the ``start``-th on."""

    def in_order(self) -> Iterator[tuple[int, Row]]:
        """Row numbers and rows in the data set's own order."""


@dataclass(frozen=True)
class TableSource:
    """A data set on this machine; a pass is a permutation seeded with ``seed + epoch``."""

    table: "datasets.Dataset"
    shuffle: bool
    seed: int

    @property
    def num_rows(self) -> int:
        return len(self.table)

    def read(self, epoch: int, start: int) -> Iterator[tuple[int, Row]]:
        order = np.arange(self.num_rows)
        if self.shuffle:
            order = np.random.default_rng(self.seed + epoch).permutation(order)
        for row in order[start:].tolist():
            yield row, self.table[row]

    def in_order(self) -> Iterator[tuple[int, Row]]:
        return enumerate(self.table)


@dataclass(frozen=True)
class StreamSource:
    """A streamed data set. It is shuffled in blocks of consecutive rows, as a block can be made
    again from its number alone: that is what makes a resumed order exact."""

    stream: "datasets.IterableDataset"
    shuffle: bool
    seed: int
    section: str
    path: str
    block: int = STREAM_BLOCK

    @property
    def num_rows(self) -> int:
        return 0

    def read(self, epoch: int, start: int) -> Iterator[tuple[int, Row]]:
        number, offset = divmod(start, self.block)
        rows = self._rows_from(number * self.block)
        while block := list(islice(rows, self.block)):
            order = np.arange(len(block))
            if self.shuffle:
                order = np.random.default_rng([self.seed + epoch, number]).permutation(order)
            yield from (block[place] for place in order[offset:].tolist())
            number, offset = number + 1, 0

    def in_order(self) -> Iterator[tuple[int, Row]]:
        return self._rows_from(0)

    def _rows_from(self, first: int) -> Iterator[tuple[int, Row]]:
        with _one_line_errors(self.section, self.path):
            yield from enumerate(self.stream.skip(first) if first else self.stream, first)


def open_source(data: DataConfig, section: str = "data") -> RowSource:
    """Opens ``data.path`` and checks that it has rows.

    ``section`` is the recipe's section that errors name. Raises ValueError for a path that is
    neither here nor on the hub, an unknown split, an unreadable file or an empty set.
    """
    if not data.path:
        raise ValueError(f"{section}.path is empty; give a .jsonl/.json/.parquet file or a hub id")
    with _one_line_errors(section, data.path), _quiet_datasets():
        loaded = _load(data, section)
    source: RowSource
    if data.streaming:
        source = StreamSource(loaded, data.shuffle, data.seed, section, data.path)
    else:
        source = TableSource(loaded, data.shuffle, data.seed)
    if next(source.in_order(), None) is None:
        raise ValueError(_empty(section, data.path))
    return source


def require_columns(row: Row, columns: dict[str, str], section: str, path: str) -> None:
    """Raises ValueError for a setting (key) whose column (value) the row lacks."""
    for setting, column in columns.items():
        if column not in row:
            raise ValueError(
                f"{section}.{setting}={column} is not a column of {path}; "
                f"it has {', '.join(row) or 'none'}"
            )


def _load(data: DataConfig, section: str) -> Any:
    import datasets

    path = Path(data.path).expanduser()
    common = {"split": data.split, "streaming": data.streaming}
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"it is a {path.suffix} file; it must end in {', '.join(FORMATS)}")
        files = {data.split.split("[")[0]: str(path)}
        return datasets.load_dataset(FORMATS[path.suffix], data_files=files, **common)
    if not path.is_dir() and _names_a_file(data.path):
        raise ValueError(f"no such file or folder; check {section}.path")
    return datasets.load_dataset(
        str(path) if path.is_dir() else data.path, data.name or None, **common
    )


def _names_a_file(path: str) -> bool:
    """Whether a path that does not exist cannot be a hub id either."""
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in FORMATS


@contextmanager
def _one_line_errors(section: str, path: str) -> Iterator[None]:
    """Turns what ``datasets`` raises into a ValueError of one line."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except StopIteration as error:
        raise ValueError(_empty(section, path)) from error
    except (OSError, ValueError, DatasetsError) as error:
        reason = _broken_json(Path(path).expanduser()) or _in_one_line(error)
        raise ValueError(f"{section}.path={path}: {reason}") from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Holds back the bars and log lines of ``datasets``: what matters of them is in our errors."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _empty(section: str, path: str) -> str:
    return f"{section}.path={path}: the data set is empty; it needs at least one row"


def _in_one_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{' '.join(str(cause).split())} ({type(cause).__name__})"


def _broken_json(path: Path) -> str:
    """Names the file and line of the first broken JSON under a path; empty if there is none."""
    files = sorted(path.rglob("*.json*")) if path.is_dir() else [path]
    found = (_broken_line(file) for file in files if file.suffix in (".jsonl", ".json"))
    return next((reason for reason in found if reason), "")


def _broken_line(path: Path) -> str:
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.lstrip().startswith("["):
        return _broken_document(path, text)
    for number, line in enumerate(text.split("\n"), 1):
        try:
            value = json.loads(line) if line.strip() else {}
        except json.JSONDecodeError as error:
            return f"line {number} of {path.name} is broken JSON: {error.msg}"
        if not isinstance(value, dict):
            return f"line {number} of {path.name} is not a JSON object; each line must be one"
    return ""


def _broken_document(path: Path, text: str) -> str:
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f"line {error.lineno} of {path.name} is broken JSON: {error.msg}"
    return ""
