"""The sums of a checkpoint's files: what is written, and what counts as damage."""

import json
from pathlib import Path

import pytest
import xxhash
from megatron.core.dist_checkpointing.validation import save_integrity_manifest

from megatron_prefix.mcore.manifest import damage, new_sum, write_manifest

FILES = {"run_state.json": json.dumps({"step": 2}), "__0_0.distcp": "weights" * 99}


def save(folder: Path, algorithm: str = "xxh3_128") -> Path:
    """A checkpoint of two files and its manifest, ours or Megatron's own."""
    for name, text in FILES.items():
        (folder / name).write_text(text)
    if algorithm == "sha256":
        save_integrity_manifest(str(folder))
    else:
        write_manifest(folder)
    assert json.loads((folder / "integrity.json").read_text())["algorithm"] == algorithm
    return folder


@pytest.mark.parametrize("algorithm", ["xxh3_128", "sha256"])
def test_what_is_whole_has_no_damage_and_every_byte_of_it_is_read(
    tmp_path: Path, algorithm: str
) -> None:
    read: list[int] = []
    assert damage(save(tmp_path, algorithm), read.append) == ""
    assert sum(read) == sum(map(len, FILES.values()))


@pytest.mark.parametrize("algorithm", ["xxh3_128", "sha256"])
@pytest.mark.parametrize("name", ["run_state.json", "__0_0.distcp", "integrity.json"])
@pytest.mark.parametrize("how", ["truncated", "a bit flipped", "missing", "empty"])
def test_damage_of_any_file_is_found(tmp_path: Path, algorithm: str, name: str, how: str) -> None:
    folder = save(tmp_path, algorithm)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    if how == "missing":
        (folder / name).unlink()
    elif how == "a bit flipped":
        (folder / name).write_bytes(content)
    else:
        (folder / name).write_bytes(content[: 0 if how == "empty" else len(content) // 2])
    told = damage(folder)
    assert told and "\n" not in told
    assert "Error" in told or f"{name}: sum" in told or "__0_0" in told or "run_state" in told


def test_sums_that_are_known_are_taken_and_the_others_are_read(tmp_path: Path) -> None:
    save(tmp_path)
    read: list[int] = []
    write_manifest(tmp_path, {"__0_0.distcp": "0" * 32}, read.append)
    assert sum(read) == len(FILES["run_state.json"])
    assert damage(tmp_path) == "__0_0.distcp: sum is not that of integrity.json"


def test_a_sum_grows_as_its_file_does() -> None:
    grown = new_sum()
    for piece in ("weights", "", " and more"):
        grown.update(piece.encode())
    assert grown.hexdigest() == xxhash.xxh3_128(b"weights and more").hexdigest()


def test_sums_of_another_kind_are_named_with_those_that_are_known(tmp_path: Path) -> None:
    manifest = {"algorithm": "md5", "files": {"run_state.json": ""}}
    (tmp_path / "integrity.json").write_text(json.dumps(manifest))
    told = "integrity.json has sums in 'md5'; known are xxh3_128, sha256"
    assert damage(tmp_path) == told
