"""The student's whole gradient as one vector that is spread over the ranks.

Megatron's optimizer knows which part of it a rank speaks for: a shard under the distributed
optimizer, no copies of tensor-parallel duplicates, tied parameters once, experts in their own
groups. The same parts make up its gradient norm.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.mcore.optimizer import TrainableStudent

Gradient = list[list[Tensor]]  # by inner optimizer, by parameter: what this rank speaks for
_BLOCK = 1 << 24  # elements that are in fp64 at a time


def owned_gradient(student: TrainableStudent) -> Gradient:
    """After a backward pass, reduced; views that the next ``zero_grad`` ends."""
    student.optimizer.prepare_grads()
    return [list(inner.get_grads_for_grad_norm()) for inner in student.inner_optimizers]


def host_copy(student: TrainableStudent) -> Gradient:
    return [
        [gradient.detach().to("cpu", copy=True) for gradient in part]
        for part in owned_gradient(student)
    ]


def cosine(student: TrainableStudent, other: Gradient) -> float:
    """Of the gradient now and an earlier :func:`host_copy`; NaN where one is zero or not finite.

    Sums in fp64. Collective; the same on all ranks.
    """
    total = torch.zeros(3, dtype=torch.float64)
    parts = zip(student.inner_optimizers, owned_gradient(student), other, strict=True)
    for inner, mine, theirs in parts:
        products = _products(mine, theirs)
        dist.all_reduce(products, group=inner.get_grad_stats_parallel_group())
        total += products.cpu()
    dot, square, other_square = total.tolist()
    scale = math.sqrt(square) * math.sqrt(other_square)
    return dot / scale if scale > 0.0 and math.isfinite(scale) else math.nan


def _products(mine: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """fp64 [3] on the collectives' device: the dot product, and each one's with itself."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for a, b in zip(mine, theirs, strict=True):
        flat = zip(a.reshape(-1).split(_BLOCK), b.reshape(-1).split(_BLOCK), strict=True)
        for x, y in ((left.double(), right.to(left.device).double()) for left, right in flat):
            sums += torch.stack([x @ y, x @ x, y @ y])
    return sums
