"""Conversions that go wrong half way: the old output stays, nothing half made takes its place."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.mcore.checked_files import CheckedFile
from megatron_prefix.mcore.contents import describe
from megatron_prefix.mcore.dist_files import DistFile
from megatron_prefix.mcore.folders import LOCK, new_folder
from megatron_prefix.mcore.forks import run_forked
from megatron_prefix.mcore.tool import check_room
from tests.distributed.test_convert import TOOLS, check_refused, run_tool, to_hf, to_megatron
from tests.tiny_models import write_tiny_qwen3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_tiny_qwen3(tmp_path / "model", vocab_size=265)
    write_byte_tokenizer(folder)
    return folder


def test_a_process_that_dies_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def work(rank: int, on_bytes: object) -> int:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)  # the others are not waited for
        return rank

    with pytest.raises(RuntimeError, match="process 1 of 3 died"):
        run_forked(3, work, lambda size: None)


def test_a_kill_leaves_no_process_that_writes_on(tmp_path: Path) -> None:
    def work(rank: int, on_bytes: object) -> None:
        (tmp_path / str(os.getpid())).touch()
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        if rank == 0:
            os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)

    def convert() -> int:
        run_forked(2, work, lambda size: None)
        return 0

    assert in_a_fork(convert) == -signal.SIGKILL
    processes = [Path("/proc") / path.name for path in tmp_path.iterdir()]
    end = time.monotonic() + 30
    while (left := [p for p in processes if lives(p)]) and time.monotonic() < end:
        time.sleep(0.05)
    for process in left:
        os.kill(int(process.name), signal.SIGKILL)
    assert not left


def lives(process: Path) -> bool:
    """Whether a process of /proc runs; one that nobody has waited for does not."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_tensor_of_no_bytes_is_written(tmp_path: Path) -> None:
    with CheckedFile(tmp_path / "file") as file:
        assert file.write(np.empty((0, 4), dtype=np.uint8)) == 0
        assert file.write(b"abc") == 3
    assert (tmp_path / "file").read_bytes() == b"abc"


def in_a_fork(work: Callable[[], int]) -> int:
    """The exit code of a process of its own; negative: the signal that ended it."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(work()))
    process.start()
    process.join(timeout=120)
    assert process.exitcode is not None
    return process.exitcode


def with_room_for(size: int, work: Callable[[], int]) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then answers with an error
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return work()


@pytest.mark.parametrize("name", ["convert_hf_to_megatron", "convert_megatron_to_hf"])
def test_a_write_that_the_disk_refuses_leaves_the_old_output(
    name: str, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    megatron, output = tmp_path / "megatron", tmp_path / "out"
    assert to_megatron(model, megatron) == 0
    source = ["--hf-model", model] if name.endswith("megatron") else ["--checkpoint", megatron]
    arguments = (*source, "--output", output, "--overwrite")
    assert run_tool(name, *arguments) == 0
    old = sorted(path.name for path in output.iterdir())
    code = in_a_fork(lambda: with_room_for(100_000, lambda: run_tool(name, *arguments)))
    assert code == 1
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("File too large; nothing of the output was replaced")
    assert sorted(path.name for path in output.iterdir()) == old
    assert not (tmp_path / "out.partial").exists()


def test_an_output_that_no_disk_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 1,048,576.000 GiB and its disk has"):
        check_room(tmp_path / "out", 2**50)


def test_a_flipped_bit_is_found(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert to_megatron(model, tmp_path / "megatron") == 0
    file = next((tmp_path / "megatron" / "step_00000000").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    check_refused(capfd, to_hf(tmp_path / "megatron", tmp_path / "out"), "does not verify", "sum")
    check_refused(capfd, run_tool("inspect_checkpoint", tmp_path / "megatron"), "does not verify")


def test_output_is_replaced_only_where_asked(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious").write_text("old")
    check_refused(capfd, to_megatron(model, output), "is there already", "--overwrite")
    assert (output / "precious").read_text() == "old"
    assert to_megatron(model, output, "--overwrite") == 0
    assert sorted(path.name for path in output.iterdir()) == ["hf", "step_00000000"]


def test_an_output_that_is_holds_or_lies_in_its_input_is_refused(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    link = tmp_path / "link"
    link.symlink_to(model)
    before = sorted(path.name for path in model.iterdir())
    for output in (model, model / "sub", tmp_path, link, tmp_path / "other" / ".." / "model"):
        code = to_megatron(model, output, "--overwrite")
        check_refused(capfd, code, f"--output {output} is, holds or lies in the input {model}")
    assert to_megatron(model, tmp_path / "megatron") == 0
    step = tmp_path / "megatron" / "step_00000000"
    for checkpoint, output in ((step, step.parent), (step.parent, step), (step, step)):
        code = to_hf(checkpoint, output, "--overwrite")
        check_refused(capfd, code, f"lies in the input {checkpoint}")
    code = to_hf(step, model, "--hf-model", model, "--overwrite")
    check_refused(capfd, code, f"lies in the input {model}")
    assert sorted(path.name for path in model.iterdir()) == before
    assert (step / "integrity.json").exists()


@pytest.mark.usefixtures("pythons_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_end_from_outside_is_one_line_and_leaves_nothing(
    number: int, model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    add = DistFile.add

    def ended(self: DistFile, *block: Any) -> None:
        os.kill(os.getpid(), number)
        add(self, *block)

    monkeypatch.setattr(DistFile, "add", ended)
    assert to_megatron(model, tmp_path / "out") == 130
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert said == "convert_hf_to_megatron: interrupted; nothing of the output was replaced"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_file_that_reads_back_otherwise_is_one_line(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.setattr("megatron_prefix.mcore.checked_files._same", lambda *_: False)
    assert to_megatron(model, tmp_path / "out") == 1
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert "out.partial/step_00000000/__0_0.distcp reads back otherwise" in said
    assert said.endswith("; nothing of the output was replaced")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("convert_hf_to_megatron", ["--hf-model", "nowhere", "--output", "out"]),
        ("convert_megatron_to_hf", ["--checkpoint", "nowhere", "--output", "out"]),
        ("inspect_checkpoint", ["nowhere"]),
        ("check_parity", ["--hf-model", "nowhere"]),
    ],
)
def test_a_mistyped_path_is_all_that_is_said(
    name: str, arguments: list[str], tmp_path: Path
) -> None:
    command = [sys.executable, str(TOOLS / f"{name}.py"), *arguments]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2
    assert line.startswith(f"{name}: error: ") and "nowhere" in line
    assert "replaced" not in line


def test_a_checkpoint_without_sums_is_exported_and_described(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert to_megatron(model, tmp_path / "megatron") == 0
    step = tmp_path / "megatron" / "step_00000000"
    (step / "integrity.json").unlink()
    assert to_hf(step, tmp_path / "back") == 0
    assert "has no integrity.json, as with checkpoint.verify_integrity=false" in caplog.text
    assert describe(step)["checksums"] == "none were saved"
    (step / "run_state.json").write_text("{}")
    with pytest.raises(ValueError, match="run_state.json says no step"):
        describe(step)


def test_a_config_that_lacks_or_breaks_something_is_named(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert to_megatron(model, tmp_path / "megatron") == 0
    config = json.loads((model / "config.json").read_text())
    del config["hidden_size"]
    (model / "config.json").write_text(json.dumps(config))
    said = f"{model}: config.json has no 'hidden_size'"
    check_refused(capfd, run_tool("inspect_checkpoint", model), said)
    quantised = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    said = "quant_method='fp8' with weight_block_size=[64, 64] in config.json"
    check_refused(capfd, to_megatron(model, tmp_path / "out"), said)
    (model / "config.json").write_text("{")
    code = to_hf(tmp_path / "megatron", tmp_path / "out", "--hf-model", model)
    check_refused(capfd, code, f"{model}: config.json is no JSON")


def test_a_kill_half_way_leaves_the_old_output(
    model: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    assert to_megatron(model, output) == 0
    old = (output / "step_00000000" / "integrity.json").read_bytes()
    add = DistFile.add

    def half_way(self: DistFile, *block: Any) -> None:
        add(self, *block)
        if len(self.written) == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(DistFile, "add", half_way)
    assert in_a_fork(lambda: to_megatron(model, output, "--overwrite")) == -signal.SIGKILL
    monkeypatch.undo()
    assert (tmp_path / "out.partial" / "step_00000000").exists()
    assert (output / "step_00000000" / "integrity.json").read_bytes() == old
    assert to_hf(output, tmp_path / "back") == 0
    capfd.readouterr()
    assert to_megatron(model, output, "--overwrite") == 0
    assert "found out.partial of a run that did not end" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model", "out"]


def test_all_is_on_the_disk_before_the_old_folder_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, bool]] = []  # path below tmp_path, whether the old folder was there

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        told.append((str(path.relative_to(tmp_path)), (tmp_path / "out" / "old").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with new_folder(tmp_path / "out") as partial:
        (partial / "step").mkdir()
        (partial / "step" / "file").touch()
    names = ("out.partial", "out.partial/step", "out.partial/step/file")
    assert sorted(told) == [(".", False), *((name, True) for name in names)]
    told.clear()
    with new_folder(tmp_path / "out", durable=False):
        pass
    assert not told


def test_a_second_writer_of_a_folder_is_refused(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with new_folder(output) as partial:
        (partial / "first").touch()
        check_refused(
            capfd, to_megatron(model, output), f"is being written by process {os.getpid()}"
        )
        with pytest.raises(ValueError, match="wait for its end or name another"):
            with new_folder(output):
                pass
        (partial / "last").touch()
    assert sorted(path.name for path in output.iterdir()) == ["first", "last"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_a_lock_ends_with_its_process_and_not_with_one_that_it_forked(tmp_path: Path) -> None:
    def writer() -> int:
        with new_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert in_a_fork(writer) == -signal.SIGKILL
    assert (tmp_path / f"out{LOCK}").exists()
    with new_folder(tmp_path / "out"):
        other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        other.start()
    try:
        with new_folder(tmp_path / "out"):
            pass
    finally:
        other.kill()
        other.join()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_moved_aside_is_put_back(tmp_path: Path) -> None:
    """A kill between the two renames leaves the old folder under its other name."""
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "old").touch()
    with new_folder(tmp_path / "out") as partial:
        assert (tmp_path / "out" / "old").exists()
        (partial / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]
