"""Triton's kernels: interpreted on a CPU against fp64, and compiled for an H200."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_prefix.loss import triton_kernels

MAXIMA = ("max_s", "max_t", "offset")
KERNELS = {
    "_statistics_kernel": ("fp64", ()),
    "_mixture_kernel": ("fp64", MAXIMA),
    "_gradient_kernel": ("bf16", ("first", "second", *MAXIMA)),
}


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


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_an_h200(name: str, kind: int) -> None:
    kernel = getattr(triton_kernels, name)
    result, vectors = KERNELS[name]
    pointers = {"student": "*fp32", "teacher": "*fp32", "result": f"*{result}"}
    pointers |= dict.fromkeys(vectors, "*fp32")
    scalars = {"columns": "i32", "inverse_temperature": "fp32"}
    scalars |= {"log_rest": "fp32", "log_beta": "fp32"} if name == "_mixture_kernel" else {}
    constants = {"BLOCK": 2048} | ({} if name == "_mixture_kernel" else {"KIND": kind})
    types = pointers | scalars | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {arg: types[arg] for arg in kernel.arg_names}, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert ".target sm_90" in compiled.asm["ptx"] and len(compiled.asm["cubin"]) > 1000
