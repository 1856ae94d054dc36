"""What a family file says: how Hugging Face tensors become Megatron-Core parameters, and back.

A :class:`Unit` is one Megatron parameter at tensor parallel 1 and the Hugging Face tensors that
make it. Families differ in configuration (``shape.py``) and in which units a layer has
(``layers.py``). An expert's parameters are units of their own,
"decoder.layers.3.mlp.experts.7.linear_fc1.weight", however Megatron groups them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pack = Callable[[Sequence[Tensor]], Tensor]


Unpack = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Unit:
    """One whole Megatron parameter by its global name, "decoder.layers.3.mlp.linear_fc1.weight"."""

    megatron_name: str
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    layer: int  # -1: before the first layer; num_layers: after the last
    expert: int = -1  # its number in the layer; -1: no expert's
    shard_axis: int = -1  # the tensor-parallel axis; -1: replicated
    blocks: int = 1  # parts along shard_axis that are sharded one by one (gate and up: 2)
    # Each Hugging Face tensor holds those of so many experts along a first axis, which hf_shapes
    # leave out: this unit's is the one at ``expert``. 0: the tensors are this unit's alone.
    stacked: int = 0
    # Whatever the model's precision: a buffer of a router, which no optimizer moves.
    fp32_buffer: bool = False
    # Travels to servers in the bucket of the unit before it: SGLang joins the two, and drops one
    # that comes alone.
    with_previous: bool = False
    pack: Pack = lambda tensors: tensors[0]
    unpack: Unpack = lambda tensor: (tensor,)
    turned: bool = False  # packing transposes the one tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole parameter's: packing joins rows."""
        if self.turned:
            return self.hf_shapes[0][::-1]
        return sum(shape[0] for shape in self.hf_shapes), *self.hf_shapes[0][1:]

    @property
    def whole_hf_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the tensors as they lie in a folder."""
        if not self.stacked:
            return self.hf_shapes
        return tuple((self.stacked, *shape) for shape in self.hf_shapes)


def hf_tensors(units: Iterable[Unit]) -> dict[str, tuple[int, ...]]:
    """The shape of every Hugging Face tensor of ``units``, by name; those of several once."""
    return {
        name: shape
        for unit in units
        for name, shape in zip(unit.hf_names, unit.whole_hf_shapes, strict=True)
    }


def joined(parts: Iterable[tuple[Unit, str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face's tensors out of the units': those of stacked units when the last one has come.

    The units of one stack follow each other, in any order.
    """
    stack: dict[int, Tensor] = {}
    for unit, name, tensor in parts:
        if not unit.stacked:
            yield name, tensor
            continue
        stack[unit.expert] = tensor
        if len(stack) == unit.stacked:
            yield name, torch.stack([stack[expert] for expert in range(unit.stacked)])
            stack.clear()
    assert not stack, "a stack of experts has been left"
