"""The folders of a run's checkpoints: which are whole, which may go, which are damaged. Files only:
nothing here is collective, and no weight is read.

``step_00000012`` is whole, ``.partial`` is being written, ``.damaged`` failed its checksums, and
``.removing`` is on its way out: a folder loses its final name before its first file goes.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from megatron_prefix.mcore import folders

PARTIAL, DAMAGED, REMOVING = ".partial", ".damaged", ".removing"


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def saved_steps(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted(f for f in folder.glob("step_*") if re.fullmatch(r"step_\d+", f.name))


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def steps_to_drop(steps: Sequence[int], newest: int, keep_last: int, keep_every: int) -> list[int]:
    """Those of ``steps`` that may go once ``newest`` is whole: it and the ``keep_last - 1`` before
    it stay, and the multiples of ``keep_every`` (0: none). ``keep_last`` 0 keeps all. Steps after
    ``newest`` are left alone: somebody put them there.
    """
    if keep_last < 1:
        return []
    before = sorted(step for step in steps if step < newest)
    old = before[: max(0, len(before) - (keep_last - 1))]
    return [step for step in old if not (keep_every and step % keep_every == 0)]


def drop(folder: Path) -> None:
    """Whole or gone: a half-removed checkpoint must not pass for one."""
    going = folder.with_suffix(REMOVING)
    shutil.rmtree(going, ignore_errors=True)
    folder.rename(going)
    shutil.rmtree(going)


def put_in_place(partial: Path, final: Path) -> None:
    """``partial`` becomes ``final``; one that was there goes only after."""
    folders.put_in_place(partial, final, final.with_suffix(REMOVING))


def set_aside(folder: Path) -> None:
    """A damaged one, for whoever wants to look: it counts no more."""
    aside = folder.with_suffix(DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def clear_unfinished(folder: Path) -> list[str]:
    """Removes what saves and removals left that were cut short; the names of those saves' steps."""
    saves = sorted(folder.glob(f"step_*{PARTIAL}"))
    for left in (*saves, *folder.glob(f"step_*{REMOVING}")):
        shutil.rmtree(left, ignore_errors=True)
    return [save.stem for save in saves]
