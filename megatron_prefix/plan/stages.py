"""How many parameters a rank holds, by arithmetic over a family's name map: quick enough for a
search over layouts. ``mcore/census.py`` counts the modules themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from megatron_prefix.layout import padded_vocab_size
from megatron_prefix.validate import ValidModel

if TYPE_CHECKING:
    from megatron_prefix.mcore.hf_map import HfModel
    from megatron_prefix.mcore.hf_map.units import Unit

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class LayerSizes:
    """Elements of one layer, by how ranks share them."""

    cut: int = 0  # over tensor-parallel ranks
    whole: int = 0  # on every rank of the stage
    experts: int = 0  # over expert-parallel and expert-tensor-parallel ranks

    @property
    def total(self) -> int:
        return self.cut + self.whole + self.experts

    def plus(self, unit: "Unit") -> "LayerSizes":
        size = elements(unit)
        if unit.expert >= 0:
            return LayerSizes(self.cut, self.whole, self.experts + size)
        if unit.shard_axis >= 0:
            return LayerSizes(self.cut + size, self.whole, self.experts)
        return LayerSizes(self.cut, self.whole + size, self.experts)


def elements(unit: "Unit") -> int:
    return sum(prod(shape) for shape in unit.hf_shapes)


def layer_sizes(hf: "HfModel") -> dict[int, LayerSizes]:
    """By layer; -1 and num_layers hold what is before the first and after the last, the
    vocabulary's tables aside: their padding depends on the layout, and routers' biases: buffers."""
    sizes: dict[int, LayerSizes] = {}
    for unit in hf.units:
        if unit.megatron_name not in VOCABULARY and not unit.fp32_buffer:
            sizes[unit.layer] = sizes.get(unit.layer, LayerSizes()).plus(unit)
    return sizes


def whole_parameters(hf: "HfModel") -> int:
    """Of the whole model, tied tables once."""
    return sum(elements(unit) for unit in hf.units)


def stage_layers(layers: Sequence[int], stage: int) -> range:
    """The layers of one pipeline stage, of ``layers`` on each."""
    first = sum(layers[:stage])
    return range(first, first + layers[stage])


@dataclass(frozen=True)
class StageParameters:
    """Of one rank of a pipeline stage."""

    dense: int
    experts: int
    vocabulary: int  # of dense, the rows of embedding and LM head

    @property
    def total(self) -> int:
        return self.dense + self.experts


def stage_parameters(
    model: ValidModel, sizes: Mapping[int, LayerSizes], stage: int, *, with_head: bool
) -> StageParameters:
    """A tied LM head on a stage of its own is a copy of the embedding; a teacher is built without
    a head."""
    layout = model.layout
    held = [sizes[layer] for layer in _of_stage(model, stage) if layer in sizes]
    tables = _tables(model, stage, with_head)
    rows = padded_vocab_size(model.hf.shape.vocab_size, layout.tp) // layout.tp
    vocabulary = tables * rows * model.hf.shape.hidden_size
    return StageParameters(
        dense=sum(size.cut // layout.tp + size.whole for size in held) + vocabulary,
        experts=sum(size.experts for size in held) // (layout.ep * layout.expert_tp),
        vocabulary=vocabulary,
    )


def _of_stage(model: ValidModel, stage: int) -> list[int]:
    layers = list(stage_layers(model.layers, stage))
    if stage == 0:
        layers.insert(0, -1)
    if stage == model.layout.pp - 1:
        layers.append(model.hf.shape.num_layers)
    return layers


def _tables(model: ValidModel, stage: int, with_head: bool) -> int:
    first, last = stage == 0, stage == model.layout.pp - 1
    head = with_head and last and not (model.hf.shape.tied and first)
    return int(first) + int(head)
