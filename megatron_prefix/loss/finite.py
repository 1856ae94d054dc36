"""Where an input is not finite."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FiniteCheck:
    """A look at one tensor that is still on its device: making it waits for nothing."""

    name: str
    shape: tuple[int, ...]
    found: Tensor  # fp64 [3] on the tensor's device: how many, where the first is, its value

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "FiniteCheck":
        flat = tensor.detach().flatten()
        if flat.numel() == 0:
            return cls(name, tuple(tensor.shape), torch.zeros(3, dtype=torch.float64))
        bad = ~torch.isfinite(flat)
        where = bad.view(torch.uint8).argmax()  # of equal elements the first
        # take: indexing with a tensor of no dimension would read it back.
        found = torch.stack([bad.sum().double(), where.double(), flat.take(where).double()])
        return cls(name, tuple(tensor.shape), found)

    def problem(self) -> str | None:
        """None where all is finite, else one line with the first position; waits for the device."""
        count, where, value = self.found.tolist()
        if not count:
            return None
        position = [int(each) for each in torch.unravel_index(torch.tensor(int(where)), self.shape)]
        return (
            f"{self.name} {list(self.shape)} has {int(count)} non-finite values; "
            f"the first, {value}, is at {position}"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError with the first position of a NaN or an infinity in ``tensor``.

    It waits for the device, so it is for set-up and for finding out why a loss was not finite;
    the loss itself never calls it.
    """
    problem = FiniteCheck.of(name, tensor).problem()
    if problem is not None:
        raise ValueError(problem)
