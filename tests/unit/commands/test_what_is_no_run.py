"""Commands that are given a file, or a folder that holds no run, among runs or alone."""

from pathlib import Path

import pytest

from megatron_prefix.cli import main
from megatron_prefix.config import Recipe
from megatron_prefix.recipe import save_record


@pytest.mark.parametrize("command", ["status", "logs", "cancel"])
def test_a_folder_without_a_run_is_told_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(tmp_path / "nowhere")]) == 2
    told = capsys.readouterr().err
    assert "is no run's folder: it has no recipe.yaml" in told
    assert told.count("\n") == 1


def test_of_several_those_that_are_no_run_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    save_record(Recipe(), folder)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    none = [str(tmp_path / "notes.txt"), str(tmp_path / "empty")]
    assert main(["status", none[0], str(folder), none[1]]) == 0
    told = capsys.readouterr()
    assert told.out.startswith(f"{folder}\n")
    lines = told.err.splitlines()
    assert [line.split(" is no run's folder")[0] for line in lines] == [
        f"megatron-prefix: warning: left out: {path}" for path in none
    ]
    assert main(["status", *none]) == 2
    assert "none of the 2 named is a run's folder" in capsys.readouterr().err.splitlines()[-1]
