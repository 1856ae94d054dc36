"""A stand-in for ``sglang-kernel`` on machines without ``libcuda.so.1``.

Every name and submodule imports; calling one is an error that names it. AMX kernels stay
unregistered in ``torch.ops.sgl_kernel``, which is how SGLang decides not to use them.
"""

import functools
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from . import seeded_sampling

__version__ = "0.4.10"  # SGLang compares it with the version that it was built for


class _CudaKernel:
    """What every missing name is: it can be looked into, but not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> "_CudaKernel":
        return _missing(self._name, attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"{self._name} is a CUDA kernel; this server runs on a CPU")


def _missing(owner: str, attribute: str) -> _CudaKernel:
    if attribute.startswith("__"):  # Python's own protocols have to see that it is not there
        raise AttributeError(attribute)
    return _CudaKernel(f"{owner}.{attribute}")


class _SubmoduleFinder(MetaPathFinder, Loader):
    """Answers ``import sgl_kernel.anything`` that is not a file of this package."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not fullname.startswith(f"{__name__}."):
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__dict__["__getattr__"] = functools.partial(_missing, spec.name)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: the names are made when they are asked for."""


def _with_cpu_default(get_device_module: Callable[..., ModuleType]) -> Callable[..., ModuleType]:
    """A CUDA build of torch answers a bare ``get_device_module()`` with ``torch.cuda``, GPU or
    not; SGLang's ``/release_memory_occupation`` then synchronizes a device that is not there."""

    @functools.cache
    def wrapped(device: Any = None) -> ModuleType:
        return torch.cpu if device is None else get_device_module(device)

    return wrapped


def __getattr__(name: str) -> _CudaKernel:
    return _missing(__name__, name)


sys.meta_path.append(_SubmoduleFinder())
seeded_sampling.register()
if not torch.cuda.is_available():
    torch.get_device_module = _with_cpu_default(torch.get_device_module)  # type: ignore[assignment]
