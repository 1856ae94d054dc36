"""Triton's kernels: interpreted on a CPU against fp64, and compiled for Hopper and Blackwell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from megatron_prefix.loss import triton_kernels

MAXIMA = ("max_s", "max_t", "offset")
KERNELS = {
    "_statistics_kernel": ("fp64", (), triton_kernels._ROW_BLOCK),
    "_mixture_kernel": ("fp64", MAXIMA, triton_kernels._ROW_BLOCK),
    "_gradient_kernel": ("bf16", ("first", "second", *MAXIMA), triton_kernels._GRADIENT_BLOCK),
}
VARIANTS = [
    (name, kind)
    for name in KERNELS
    for kind in ([None] if name == "_mixture_kernel" else range(len(triton_kernels._KINDS)))
]


def test_kernels_under_the_interpreter() -> None:
    """``test_kernels.py`` once more, in a process where Triton interprets."""
    cases = Path(__file__).with_name("test_kernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-5000:]
    assert passed is not None and int(passed.group(1)) > 60


@pytest.mark.parametrize(("name", "kind"), VARIANTS)
@pytest.mark.parametrize("capability", [90, 100])
def test_kernels_compile_for_hopper_and_blackwell_without_spills(
    name: str, kind: int | None, capability: int
) -> None:
    """At the longest block of each, on rows that vector loads can take."""
    kernel = getattr(triton_kernels, name)
    result, vectors, block = KERNELS[name]
    pointers = {"student": "*fp32", "teacher": "*fp32", "result": f"*{result}"}
    pointers |= dict.fromkeys(vectors, "*fp32")
    scalars = {"columns": "i32", "inverse_temperature": "fp32"}
    scalars |= {"log_rest": "fp32", "log_beta": "fp32"} if kind is None else {}
    constants = {"BLOCK": block} | ({} if kind is None else {"KIND": kind})
    types = pointers | scalars | dict.fromkeys(constants, "constexpr")
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    aligned[(kernel.arg_names.index("columns"),)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, {arg: types[arg] for arg in kernel.arg_names}, constants, aligned)
    target = GPUTarget("cuda", capability, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": 8}).asm["ptx"]
    assert "ld.global.v4" in ptx
    assert "0 bytes spill stores, 0 bytes spill loads" in assembled(ptx, capability)


def assembled(ptx: str, capability: int) -> str:
    """What Triton's own assembler says of its registers."""
    target = re.search(rf"\.target (sm_{capability}\w*)", ptx)
    assert target is not None
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={target.group(1)}", "/dev/stdin"]
    done = subprocess.run(
        [*command, "-o", "/dev/null"], input=ptx, capture_output=True, text=True, check=True
    )
    return done.stderr
