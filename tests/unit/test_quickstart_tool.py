"""What ``make quickstart`` does around the run itself."""

from pathlib import Path

import pytest

from tools.quickstart import main, move_aside


def test_an_earlier_run_is_moved_to_the_first_free_name(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    assert move_aside(folder) is None
    for number in (1, 2):
        folder.mkdir()
        (folder / "summary.json").write_text(str(number))
        assert move_aside(folder) == tmp_path / f"quickstart.{number}"
        assert not folder.exists()
    assert (tmp_path / "quickstart.1" / "summary.json").read_text() == "1"


def test_a_mistyped_setting_is_one_line_and_moves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    overrides = [f"run.output_dir={tmp_path}", "run.name=run", "train.stepz=3"]
    assert main(overrides) == 2
    error = capsys.readouterr().err
    assert error.startswith("quickstart: error: ") and error.count("\n") == 1
    assert "steps" in error
    assert (tmp_path / "run").is_dir()
