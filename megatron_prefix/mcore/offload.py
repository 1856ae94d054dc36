"""Weights that lie in host memory, and on the device only while they are in use.

The device memory behind the parameters is given back, not the parameters: each keeps its shape,
its dtype and its strides over a storage of no bytes.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from megatron_prefix.mcore.fp8 import drop_weight_copies


class HostWeights:
    """A module that runs forward only, whose parameters live on the host.

    The host's copy is one buffer of bytes, page-locked where the module is on a GPU. Buffers of
    the module (routers' biases, rotary tables) are small, and stay on the device. Nothing here is
    collective.
    """

    def __init__(self, module: nn.Module) -> None:
        """Takes a copy of the parameters, and their device memory away."""
        self._module = module
        # By identity: parameters may share a storage.
        storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in module.parameters()}
        self._sizes = [(storage, storage.nbytes()) for storage in storages.values()]
        self._device = next(module.parameters()).device
        self._host = torch.empty(self.nbytes, dtype=torch.uint8)
        on_gpu = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if on_gpu else None
        self._arrived: torch.cuda.Event | None = None
        self._on_device, self._waited_s = True, 0.0
        if on_gpu:
            _page_lock(self._host)
        self.keep()
        self.release()

    @property
    def nbytes(self) -> int:
        """Of all parameters."""
        return sum(size for _, size in self._sizes)

    def fetch(self) -> None:
        """The weights are on their way to the device; on a GPU, beside whatever it computes."""
        if self._on_device:
            return
        self._on_device = True
        for storage, size in self._sizes:
            storage.resize_(size)
        if self._stream is None:
            self._copy_in()
            return
        # The memory may be that of a tensor which kernels queued so far still use.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            self._copy_in()
            self._arrived = self._stream.record_event()

    @contextmanager
    def here(self) -> Iterator[None]:
        """On the device within the block, and off it after it."""
        start = time.perf_counter()
        self.fetch()
        if self._arrived is not None:
            self._arrived.synchronize()
        self._waited_s += time.perf_counter() - start
        yield
        self.release()

    def keep(self) -> None:
        """What is on the device is what the host holds from now on."""
        assert self._on_device
        for device, host in self._pairs():
            host.copy_(device)

    def release(self) -> None:
        """Gives the device memory back, that of FP8 copies of the weights as well."""
        if self._arrived is not None:
            self._arrived.synchronize()  # where nobody came to use them
            self._arrived = None
        drop_weight_copies(self._module)
        for storage, _ in self._sizes:
            storage.resize_(0)
        self._on_device = False

    def take_waited_s(self) -> float:
        """Seconds that :meth:`here` stood waiting since this was last asked."""
        waited, self._waited_s = self._waited_s, 0.0
        return waited

    def _copy_in(self) -> None:
        for device, host in self._pairs():
            device.copy_(host, non_blocking=True)

    def _pairs(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Each storage on the device as bytes, and its place in the host's buffer."""
        parts = self._host.split([size for _, size in self._sizes])
        for (storage, _), host in zip(self._sizes, parts, strict=True):
            yield torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage), host


class Offload:
    """All models of a run whose weights lie in host memory, in the order in which they are used."""

    def __init__(self, weights: Sequence[HostWeights] = ()) -> None:
        self._weights = weights

    def begin_step(self, *, used: bool) -> None:
        """Where they are ``used`` in it, the weights of the first come while others still work."""
        self.take_waited()
        for weights in self._weights[: int(used)]:
            weights.fetch()

    def take_waited(self) -> dict[str, float]:
        """Seconds waited for weights since :meth:`begin_step`, by their phase's name; empty where
        no model is offloaded."""
        if not self._weights:
            return {}
        return {"offload": sum([weights.take_waited_s() for weights in self._weights])}


def _page_lock(host: Tensor) -> None:
    """For as long as the process takes. ``pin_memory`` would round the buffer up to a power of
    two, which for a large model is as much again."""
    cudart = torch.cuda.cudart()
    torch.cuda.check_error(int(cudart.cudaHostRegister(host.data_ptr(), host.nbytes, 0)))
