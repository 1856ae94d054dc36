import json
from pathlib import Path

import datasets
import pytest

from megatron_prefix.config import DataConfig
from megatron_prefix.data.data_source import RowSource, StreamSource, open_source

pytestmark = pytest.mark.usefixtures("own_cache")


def texts(n: int) -> list[dict[str, str]]:
    return [{"prompt": f"p{row}"} for row in range(n)]


def write_lines(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(source: RowSource) -> list[str]:
    return [row["prompt"] for _, row in source.in_order()]


def test_json_lists_parquet_and_folders_are_read(tmp_path: Path) -> None:
    rows = texts(3)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "f").mkdir()
    write_lines(tmp_path / "f" / "train.jsonl", rows)
    write_lines(tmp_path / "f" / "test.jsonl", texts(1))
    for name in ("a.json", "a.parquet", "f"):
        source = open_source(DataConfig(path=str(tmp_path / name)))
        assert source.num_rows == 3 and prompts(source) == ["p0", "p1", "p2"], name
        streamed = open_source(DataConfig(path=str(tmp_path / name), streaming=True))
        assert streamed.num_rows == 0 and prompts(streamed) == ["p0", "p1", "p2"], name
    held_out = open_source(DataConfig(path=str(tmp_path / "f"), split="test"))
    assert prompts(held_out) == ["p0"]


def test_a_split_of_a_file_can_be_sliced(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(10))
    assert open_source(DataConfig(path=path, split="train[:4]")).num_rows == 4
    assert open_source(DataConfig(path=path, split="test")).num_rows == 10


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    data = DataConfig(path=write_lines(tmp_path / "a.jsonl", texts(2)))
    assert open_source(data).num_rows == 2
    write_lines(tmp_path / "a.jsonl", texts(3))
    assert open_source(data).num_rows == 3


def test_a_streamed_set_is_shuffled_in_blocks_and_resumes_inside_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", texts(10))
    rows = datasets.load_dataset("json", data_files=path, split="train", streaming=True)
    source = StreamSource(rows, shuffle=True, seed=5, section="data", path=path, block=4)
    whole = [number for number, _ in source.read(1, 0)]
    assert sorted(whole[:4]) == [0, 1, 2, 3] and sorted(whole[8:]) == [8, 9]
    assert whole != sorted(whole) and whole != [number for number, _ in source.read(2, 0)]
    for start in range(11):
        resumed = list(source.read(1, start))
        assert [number for number, _ in resumed] == whole[start:]
        assert all(row == {"prompt": f"p{number}"} for number, row in resumed)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a"}\n{"prompt": "b", \n', "line 2 of a.jsonl is broken JSON"),
        ('{"prompt": "a"}\n\n{"prompt": "b"', "line 3 of a.jsonl is broken JSON"),
        ('{"prompt": "a"}\n5\n', "line 2 of a.jsonl is not a JSON object"),
        ("", "the data set is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, streaming: bool, content: str, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        list(open_source(DataConfig(path=str(path), streaming=streaming)).in_order())
    assert "\n" not in str(caught.value) and "data.path=" in str(caught.value)


def test_a_broken_line_in_a_folder_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", texts(2))
    (tmp_path / "b.jsonl").write_text('{"prompt": "a"}\n{"prompt": }\n')
    with pytest.raises(ValueError, match="eval.path=.*: line 2 of b.jsonl is broken JSON"):
        open_source(DataConfig(path=str(tmp_path)), "eval")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("", "data.path is empty"),
        ("{tmp}/none.jsonl", "none.jsonl: no such file or folder"),
        ("none.jsonl", "data.path=none.jsonl: no such file or folder"),
        ("{tmp}/notes.txt", "it is a .txt file; it must end in .jsonl, .json, .parquet"),
        ("{tmp}/broken.json", "line 2 of broken.json is broken JSON"),
        ("{tmp}/broken.parquet", "broken.parquet: .*"),
        ("{tmp}/empty", "empty: .*doesn't contain any data files"),
    ],
)
def test_bad_paths_are_named_in_one_line(tmp_path: Path, path: str, words: str) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.json").write_text('[{"prompt": "a"},\n{"prompt": }]')
    (tmp_path / "broken.parquet").write_text("hello")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=words) as caught:
        open_source(DataConfig(path=path.format(tmp=tmp_path)))
    assert "\n" not in str(caught.value)


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", texts(1))
    with pytest.raises(ValueError, match='data.path=.*Unknown split "dev"'):
        open_source(DataConfig(path=str(tmp_path), split="dev"))


def test_a_hub_id_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="data.path=someone/something: .*the Hub"):
        open_source(DataConfig(path="someone/something"))


def test_reading_leaves_the_progress_bars_of_datasets_as_they_were(tmp_path: Path) -> None:
    datasets.enable_progress_bars()
    open_source(DataConfig(path=write_lines(tmp_path / "a.jsonl", texts(1))))
    assert not datasets.are_progress_bars_disabled()
