"""The elementwise passes of a chunk in C++, for the CPU; the contract of ``kernels.Kernels``.

The library is compiled for this machine's processor at its first use, in half a second, with
whatever C++ compiler there is, and cached in the user's cache folder. Without a compiler
``library()`` is None and ``torch_kernels`` does the work.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from megatron_prefix.loss.divergence import (
    MIXTURE_STATISTICS,
    GradientFactors,
    Merged,
    WholeRows,
    empty_statistics,
)
from megatron_prefix.loss.kernels import Kernels, Logits

_SOURCE = Path(__file__).with_suffix(".cpp")
# GCC contracts a * b + c into one rounding by default; Clang needs to be told.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-pthread",
    "-shared",
    "-fPIC",
)
_KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None, with a warning, where it cannot be compiled or loaded."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    try:
        if compiler is None:
            raise FileNotFoundError("no C++ compiler was found; install g++")
        path = _library_path(compiler)
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        logging.getLogger(__name__).warning("the loss runs without its C++ kernels: %s", told)
        return None


def _library_path(compiler: str) -> Path:
    """One file for each source, compiler and processor: ``-march=native`` does not travel."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = next((line for line in lines if line.startswith("flags")), platform.machine())
    told = "\n".join((_SOURCE.read_text(), *_FLAGS, version.stdout, processor))
    name = f"loss_kernels_{hashlib.sha256(told.encode()).hexdigest()[:16]}.so"
    return Path.home() / ".cache" / "megatron_prefix" / name


def _compile(compiler: str, path: Path) -> None:
    """Into a file of its own first: other ranks may be compiling the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        os.replace(built, path)


class NativeKernels(Kernels):
    """Only where ``library()`` is not None. The buffers hold what ``torch_kernels`` says."""

    def one_rank(self, logits: Logits, token_weight: Tensor | None) -> WholeRows:
        """Row by row through all passes, while the row is in cache."""
        statistics = empty_statistics(logits.student)
        values = statistics.new_empty(statistics.shape[0])
        weight = ctypes.c_void_p(None) if token_weight is None else token_weight.contiguous()
        beta = ctypes.c_float(logits.divergence.beta)
        _call("one_rank", logits, _inverse_temperature(logits), beta, weight, statistics, values)
        return WholeRows(statistics, values, logits.student)

    def statistics(self, logits: Logits) -> Tensor:
        result = empty_statistics(logits.student)
        _call("statistics", logits, _inverse_temperature(logits), result)
        return result

    def mixture(self, logits: Logits, merged: Merged) -> Tensor:
        result = torch.zeros((len(logits.student), MIXTURE_STATISTICS), dtype=torch.float64)
        scales = merged.scale_s.float(), merged.scale_t.float(), merged.offset.float()
        _call("mixture", logits, *scales, ctypes.c_float(logits.divergence.beta), result)
        return result

    def logit_gradient(self, logits: Logits, factors: GradientFactors) -> Tensor:
        _call("logit_gradient", logits, factors.first, factors.second)
        return logits.student


def _inverse_temperature(logits: Logits) -> ctypes.c_float:
    return ctypes.c_float(1 / logits.divergence.temperature)


def _call(name: str, logits: Logits, *arguments: object) -> None:
    """Tensors go as pointers; they must be contiguous, and the caller's references hold them."""
    student, teacher = logits.student, logits.teacher
    rows, columns = student.shape
    if columns == 0:
        return
    assert teacher.shape == student.shape and teacher.is_contiguous() and student.is_contiguous()
    kernels = library()
    assert kernels is not None
    getattr(kernels, name)(
        _pointer(student),
        _pointer(teacher),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_int(torch.get_num_threads()),
        ctypes.c_int(_KINDS[logits.divergence.name]),
        *(_pointer(each) if isinstance(each, Tensor) else each for each in arguments),
    )


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())
