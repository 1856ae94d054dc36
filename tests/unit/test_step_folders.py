"""Which checkpoints may go, and under which names."""

import itertools
import json
from pathlib import Path

import pytest

from megatron_prefix.mcore.step_folders import (
    clear_unfinished,
    drop,
    put_in_place,
    saved_steps,
    set_aside,
    step_folder,
    steps_to_drop,
)


def write(folder: Path, step: int) -> Path:
    """What stands for a checkpoint."""
    made = step_folder(folder, step)
    made.mkdir(parents=True)
    files = {"run_state.json": json.dumps({"step": step}), "__0_0.distcp": "weights" * 99}
    for name, text in files.items():
        (made / name).write_text(text)
    return made


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"),
    [(1, 0, [2, 4, 6, 8]), (2, 0, [2, 4, 6]), (9, 0, []), (0, 0, []), (0, 4, []), (1, 4, [2, 6])],
)
def test_the_last_and_every_nth_stay(keep_last: int, keep_every: int, gone: list[int]) -> None:
    assert steps_to_drop([2, 4, 6, 8, 10], 10, keep_last, keep_every) == gone


def test_whatever_is_set_the_newest_stays_and_so_does_what_is_newer_than_it() -> None:
    for keep_last, keep_every, newest in itertools.product(range(4), range(4), (2, 4, 6)):
        gone = steps_to_drop([6, 2, 4, 8], newest, keep_last, keep_every)
        assert all(step < newest for step in gone)


def test_only_final_names_are_whole(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        write(tmp_path, step)
    step_folder(tmp_path, 12).with_suffix(".partial").mkdir()
    set_aside(step_folder(tmp_path, 10))
    assert [path.name for path in saved_steps(tmp_path)] == ["step_00000002", "step_00000004"]
    assert (tmp_path / "step_00000010.damaged" / "run_state.json").exists()
    drop(step_folder(tmp_path, 2))
    assert [path.name for path in saved_steps(tmp_path)] == ["step_00000004"]


def test_a_removal_that_was_cut_short_leaves_nothing_that_passes_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path, 2)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(
            "shutil.rmtree",
            lambda path, ignore_errors=False: killed() if (not ignore_errors) else None,
        )
        with pytest.raises(KeyboardInterrupt):
            drop(folder)
    assert saved_steps(tmp_path) == []
    assert (tmp_path / "step_00000002.removing" / "run_state.json").exists()


def test_what_was_cut_short_is_cleared_and_nothing_else_is(tmp_path: Path) -> None:
    kept = {write(tmp_path, 2).name, write(tmp_path, 4).with_suffix(".damaged").name}
    set_aside(step_folder(tmp_path, 4))
    for step, end in ((7, ".partial"), (6, ".partial"), (1, ".removing")):
        write(tmp_path / "new", step).rename(step_folder(tmp_path, step).with_suffix(end))
    (tmp_path / "new").rmdir()
    assert clear_unfinished(tmp_path) == ["step_00000006", "step_00000007"]
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert clear_unfinished(tmp_path / "nowhere") == []


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    old = write(tmp_path, 2)
    new = write(tmp_path / "new", 2).rename(tmp_path / "step_00000002.partial")
    (new / "note").write_text("new")
    put_in_place(new, old)
    assert (old / "note").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "step_00000002"]
