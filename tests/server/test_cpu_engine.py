"""The stand-in for SGLang's CUDA kernels, in processes of its own: it changes the one it is in."""

import importlib.util
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_prefix.rollout import command

ENGINE = Path(command.__file__).with_name("cpu_engine")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ENGINE)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_name_imports_and_no_kernel_runs() -> None:
    answer = run(
        "import sgl_kernel, sgl_kernel.flash_attn, torch\n"
        "from sgl_kernel.deep.down import kernel\n"
        "from sgl_kernel import silu_and_mul\n"
        "assert not hasattr(torch.ops.sgl_kernel, 'convert_weight_packed'), 'AMX would be used'\n"
        "assert not hasattr(sgl_kernel, '__no_such_protocol__')\n"
        "torch.get_device_module().synchronize()\n"
        "kernel.of.some(1)\n"
    )
    assert answer.stderr.strip().splitlines()[-1] == (
        "RuntimeError: sgl_kernel.deep.down.kernel.of.some is a CUDA kernel; "
        "this server runs on a CPU"
    )


@pytest.mark.parametrize("architecture", command.SERVED_MODULES)
def test_the_served_models_are_sglangs(architecture: str) -> None:
    """Looked up without an import, which takes SGLang half a minute."""
    sglang = importlib.util.find_spec("sglang")
    assert sglang is not None
    assert sglang.origin is not None
    models = Path(sglang.origin).parent / "srt" / "models"
    source = (models / f"{command.SERVED_MODULES[architecture]}.py").read_text()
    assert f"class {architecture}(" in source


def load_seeded_sampling() -> ModuleType:
    path = ENGINE / "sgl_kernel" / "seeded_sampling.py"
    spec = importlib.util.spec_from_file_location("seeded_sampling", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, of whole words."""
    word, state = 0xFFFFFFFF, 0
    for (block,) in struct.iter_unpack("<I", data):
        mixed = block * 0xCC9E2D51 & word
        mixed = (mixed << 15 | mixed >> 17) & word
        state ^= mixed * 0x1B873593 & word
        state = (state << 13 | state >> 19) & word
        state = (state * 5 + 0xE6546B64) & word
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B & word
    state = (state ^ state >> 13) * 0xC2B2AE35 & word
    return state ^ state >> 16


def test_the_reference_hashes_as_published() -> None:
    assert murmur3(b"test") == 0xBA6BD213


def test_seeded_sampling_hashes_seed_position_and_column() -> None:
    seeds = torch.tensor([0, 42, 2**31 + 5, 2**62 + 12345, -1])
    positions, columns = torch.tensor([0, 7, 300, 2**20, 1]), torch.arange(0, 2000, 7)
    hashed = load_seeded_sampling().murmur_hash32(seeds, positions, columns)
    expected = [
        [murmur3(struct.pack("<qII", seed, position, column)) for column in columns.tolist()]
        for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True)
    ]
    assert hashed.dtype == torch.uint32
    assert hashed.to(torch.int64).tolist() == expected
