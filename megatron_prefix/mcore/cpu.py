"""The one adapter that lets Megatron-Core 0.19.2 run without CUDA; a no-op where CUDA is.

Megatron-Core asks torch.cuda for devices, streams and RNG states without asking first whether there
is a GPU. This file answers those calls on the CPU and touches nothing else. Call
:func:`adapt_to_cpu` before any ``megatron`` import.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")
FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "tensor",
    "zeros",
    "zeros_like",
)


def adapt_to_cpu() -> bool:
    """Install the adapter; returns whether this process runs Megatron on the CPU."""
    if torch.cuda.is_available():
        return False
    if getattr(torch, "_megatron_prefix_on_cpu", False):
        return True
    torch._megatron_prefix_on_cpu = True  # type: ignore[attr-defined]
    # megatron.core imports these where it finds them. SGLang brings flash_mla, which dies of it (no
    # libcuda), and kernels for GPUs, slow to import; Transformer Engine's sums and norms of
    # gradients want a device.
    for package in ("flash_mla", "flashinfer", "quack", "transformer_engine"):
        sys.modules[package] = None  # type: ignore[assignment]
    _adapt_devices()
    _adapt_streams()
    _adapt_rng()
    _adapt_optimizers()
    _adapt_token_dispatcher()
    _adapt_ragged_gathers()
    return True


def put_on_meta() -> None:
    """After :func:`adapt_to_cpu`: what Megatron puts on the current device is a shape alone."""
    torch.cuda.current_device = lambda: torch.device("meta")  # type: ignore[assignment,return-value]


class _InOrder:
    """Stands for a stream or an event: CPU work is done when its call returns."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def wait(self, _: Any = None) -> None: ...
    def record(self, _: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _InOrder()


def _names_cuda(device: Any) -> bool:
    return str(device).startswith("cuda")


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # pinning needs a CUDA context
        return factory(*args, **kwargs)

    return build


def _adapt_devices() -> None:
    from torch.utils import _device

    # Caches torch's own factories: without it `with torch.device("meta")` no longer sees them.
    _device._device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.Tensor.record_stream = lambda self, _: None  # type: ignore[method-assign,assignment]
    # Megatron-Core uses the current device as a `device=` argument alone.
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.empty_cache = lambda: None


def _adapt_streams() -> None:
    stream = _InOrder()
    torch.cuda.synchronize = lambda *_, **__: None
    torch.cuda.Stream = torch.cuda.Event = _InOrder  # type: ignore[assignment,misc]
    torch.cuda.current_stream = lambda *_: stream  # type: ignore[assignment,return-value]
    torch.cuda.default_stream = lambda *_: stream  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda _: contextlib.nullcontext()  # type: ignore[assignment,misc,return-value]


def _adapt_rng() -> None:
    from megatron.core.tensor_parallel import random as mcore_random

    mcore_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    class CpuRNGStatesTracker(mcore_random.CudaRNGStatesTracker):
        """Megatron's tracker over the CPU generator's state."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"RNG state {name!r} or seed {seed} already exists")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    mcore_random._CUDA_RNG_STATE_TRACKER = CpuRNGStatesTracker()
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


class CpuFusedAdam(torch.optim.Optimizer):
    """AdamW with the state layout of Transformer Engine's FusedAdam.

    The step count lives in the group and a tensor's state is ``exp_avg`` and ``exp_avg_sq`` alone,
    so the distributed optimizer takes the GPU's path and writes the GPU's checkpoint: torch's own
    AdamW cannot be loaded there (KeyError: 'step'). Formula: Loshchilov & Hutter,
    arXiv 1711.05101, with bias correction folded into the step size.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        **_: Any,
    ) -> None:
        if not adam_w_mode:
            raise ValueError("on a CPU only decoupled weight decay (AdamW) is implemented")
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        beta1, beta2 = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(param.grad, 1 - beta1)
        square.mul_(beta2).addcmul_(param.grad, param.grad, value=1 - beta2)
        param.mul_(1 - group["lr"] * group["weight_decay"])
        root = square.sqrt().div_((1 - beta2 ** group["step"]) ** 0.5).add_(group["eps"])
        param.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1 ** group["step"]))


def _adapt_optimizers() -> None:
    import megatron.core.optimizer as mcore_optimizer
    from megatron.core.optimizer import distrib_optimizer

    # The optimizers sort parameters by p.type() == "torch.cuda.FloatTensor" and the like.
    cpu_type = torch.Tensor.type

    def type_as_if_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = cpu_type(self, *args, **kwargs)
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and asker.startswith("megatron.core.optimizer"):
            kind = result.rpartition(".")[2]
            return f"torch.cuda.{kind}"
        return result

    torch.Tensor.type = type_as_if_cuda  # type: ignore[method-assign,assignment]
    if mcore_optimizer.USING_PYTORCH_OPTIMIZER:
        mcore_optimizer.Adam = distrib_optimizer.Adam = CpuFusedAdam
        mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _adapt_token_dispatcher() -> None:
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        # On the CPU the original leaves a tensor where all_to_all_single wants a list of ints.
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor)

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _adapt_ragged_gathers() -> None:
    """gloo gathers and scatters equal parts alone; experts that are both spread and cut have as
    many tokens each as their router chose."""
    from megatron.core.tensor_parallel import mappings

    gather = mappings._gather_along_first_dim
    scatter = mappings._reduce_scatter_along_first_dim

    def gather_ragged(
        own: torch.Tensor, group: Any, output_split_sizes: Any = None, *rest: Any, **named: Any
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return gather(own, group, output_split_sizes, *rest, **named)
        longest = max(output_split_sizes)
        padded = own.new_zeros((longest, *own.shape[1:]))
        padded[: len(own)] = own
        parts = gather(padded, group, None, *rest, **named).split(longest)
        return torch.cat([p[:n] for p, n in zip(parts, output_split_sizes, strict=True)])

    def scatter_ragged(
        whole: torch.Tensor, group: Any, input_split_sizes: Any = None, *rest: Any, **named: Any
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return scatter(whole, group, input_split_sizes, *rest, **named)
        summed = whole.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed, group=group)
        return summed.split(input_split_sizes)[group.rank()].contiguous()

    mappings._gather_along_first_dim = gather_ragged
    mappings._reduce_scatter_along_first_dim = scatter_ragged
