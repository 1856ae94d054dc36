"""Where a unit lies in Megatron's distributed checkpoint: the key, the whole shape and the place.

The keys are those of Transformer Engine's modules, which Megatron-Core's local ones answer to as
well: a checkpoint loads on machines of either kind. Layers that are all alike are stacked under one
key, with the layer as the first axis; experts of a layer are stacked too.
"""

from dataclasses import dataclass

from megatron_prefix.layout import padded_vocab_size
from megatron_prefix.mcore.hf_map import HfModel
from megatron_prefix.mcore.hf_map.units import Unit

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Place:
    """A rectangular block of a tensor in a distributed checkpoint."""

    key: str
    whole: tuple[int, ...]  # the tensor's shape
    offset: tuple[int, ...]  # of the block's first element, by axis
    size: tuple[int, ...]  # the block's shape

    def rows(self, axis: int, start: int, stop: int) -> "Place":
        """``start:stop`` of the block along its ``axis``-th axis from the end, counted from 1."""
        at = len(self.whole) - axis
        offset, size = list(self.offset), list(self.size)
        offset[at] += start
        size[at] = stop - start
        return Place(self.key, self.whole, tuple(offset), tuple(size))


def place_of(unit: Unit, hf: HfModel) -> Place:
    """Where a unit lies: layers that are alike, and a layer's experts, are stacked in one tensor.

    A vocabulary matrix has the rows that tensor parallel 1 pads it to.
    """
    shape = unit.shape
    if unit.megatron_name in VOCABULARY:
        shape = (padded_vocab_size(shape[0], 1), *shape[1:])
    parts = unit.megatron_name.split(".", 3)
    if parts[:2] != ["decoder", "layers"]:
        return Place(unit.megatron_name, shape, (0,) * len(shape), shape)
    layer, tail = int(parts[2]), _tail(parts[3], unit, hf)
    stacks: list[tuple[int, int]] = []  # (length, place) of each axis before the unit's own
    prefix = f"decoder.layers.{layer}."
    if "moe_layer_freq" not in hf.settings:
        prefix = "decoder.layers."
        stacks.append((hf.shape.num_layers, layer))
    if unit.expert >= 0:
        stacks.append((hf.shape.num_experts, unit.expert))
    return Place(
        key=prefix + tail,
        whole=(*(length for length, _ in stacks), *shape),
        offset=(*(place for _, place in stacks), *[0] * len(shape)),
        size=(*[1] * len(stacks), *shape),
    )


def _tail(tail: str, unit: Unit, hf: HfModel) -> str:
    if unit.expert >= 0:
        return tail.replace(f"mlp.experts.{unit.expert}.", "mlp.experts.experts.")
    if hf.latent_attention:
        fused = {
            "self_attention.q_layernorm.weight": "self_attention.linear_q_up_proj",
            "self_attention.kv_layernorm.weight": "self_attention.linear_kv_up_proj",
        }
    else:
        fused = {"input_layernorm.weight": "self_attention.linear_qkv"}
    if unit.layer not in hf.shape.sparse_layers:
        fused["pre_mlp_layernorm.weight"] = "mlp.linear_fc1"
    return f"{fused[tail]}.layer_norm_weight" if tail in fused else tail
