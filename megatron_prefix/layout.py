"""Where each rank stands in a model's grid: pure arithmetic, no torch.

Megatron's rank order "tp-cp-ep-dp-pp": tensor-parallel neighbours are next to each other,
pipeline stages are furthest apart. The experts of a mixture see the same ranks of a stage as a grid
of their own: expert tensor parallel, expert parallel, expert data parallel.
"""

import math
from dataclasses import dataclass

from megatron_prefix.config import ModelConfig

# Rows of a vocabulary shard are a multiple of this: 16 bytes in bf16, what tensor cores want.
VOCAB_ALIGNMENT = 8


@dataclass(frozen=True)
class Layout:
    """One model's grid over ``tp * dp * pp`` ranks from ``first_rank`` on; a stage's ``tp * dp``
    ranks are also ``expert_tp * ep * expert_dp``."""

    tp: int
    dp: int
    pp: int
    ep: int = 1
    etp: int = 0  # tensor parallel of the experts; 0: as tp
    first_rank: int = 0  # above 0 for a model beside another in one world

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def expert_tp(self) -> int:
        return self.etp or self.tp

    @property
    def expert_dp(self) -> int:
        return self.tp * self.dp // (self.expert_tp * self.ep)

    @property
    def ranks(self) -> range:
        """The global ranks that hold a part of the model."""
        return range(self.first_rank, self.first_rank + self.world_size)

    def rank(self, tp: int, dp: int, pp: int) -> int:
        return self.first_rank + tp + self.tp * (dp + self.dp * pp)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp, dp, pp) of a global rank of :attr:`ranks`."""
        own = rank - self.first_rank
        return own % self.tp, own // self.tp % self.dp, own // (self.tp * self.dp)

    def expert_coordinates(self, rank: int) -> tuple[int, int, int]:
        """(expert tp, ep, expert dp) of a global rank within its pipeline stage."""
        inside, tp = (rank - self.first_rank) % (self.tp * self.dp), self.expert_tp
        return inside % tp, inside // tp % self.ep, inside // (tp * self.ep)

    def last_stage(self, dp: int) -> tuple[int, ...]:
        """Global ranks of the last pipeline stage of one replica, in tensor-parallel order."""
        return tuple(self.rank(tp, dp, self.pp - 1) for tp in range(self.tp))


def model_layout(model: ModelConfig, world_size: int, first_rank: int = 0) -> Layout:
    """The grid of ``model`` over ``world_size`` ranks; ValueError where it does not divide."""
    per_replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    if world_size % per_replica:
        raise ValueError(
            f"world size {world_size} is no multiple of tensor*pipeline parallel = "
            f"{model.tensor_model_parallel_size}*{model.pipeline_model_parallel_size}; "
            f"start {math.ceil(world_size / per_replica) * per_replica} ranks"
        )
    layout = Layout(
        tp=model.tensor_model_parallel_size,
        dp=world_size // per_replica,
        pp=model.pipeline_model_parallel_size,
        ep=model.expert_model_parallel_size,
        etp=model.expert_tensor_parallel_size,
        first_rank=first_rank,
    )
    if layout.tp * layout.dp % (layout.expert_tp * layout.ep):
        least = least_world_size(model)
        raise ValueError(
            f"world size {world_size}: the {layout.tp * layout.dp} ranks of a pipeline stage are "
            f"no multiple of expert tensor*expert parallel = {layout.expert_tp}*{layout.ep}; "
            f"start {math.ceil(world_size / least) * least} ranks"
        )
    return layout


def least_world_size(model: ModelConfig) -> int:
    """The least ranks that hold ``model``; every world that holds it is a multiple of this."""
    tp = model.tensor_model_parallel_size
    experts = (model.expert_tensor_parallel_size or tp) * model.expert_model_parallel_size
    return math.lcm(tp, experts) * model.pipeline_model_parallel_size


def padded_vocab_size(vocab_size: int, tp: int) -> int:
    """Vocabulary rows over all tensor-parallel shards, each a multiple of VOCAB_ALIGNMENT."""
    multiple = VOCAB_ALIGNMENT * tp
    return -(-vocab_size // multiple) * multiple


def layers_by_stage(num_layers: int, pp: int, first: int = 0) -> tuple[int, ...]:
    """Layers on each stage. ``first`` > 0 fixes the first stage's; the rest must divide.

    With ``first`` 0 the layers divide evenly, or the first stage takes the remainder.
    """
    if pp == 1:
        return (num_layers,)
    if first == 0:
        first = num_layers - num_layers // pp * (pp - 1)
    rest, left = divmod(num_layers - first, pp - 1)
    if left or rest < 1:
        raise ValueError(
            f"num_layers_in_first_pipeline_stage={first} leaves {num_layers - first} of "
            f"{num_layers} layers for {pp - 1} more stages; try "
            f"{num_layers - num_layers // pp * (pp - 1)}"
        )
    return (first, *([rest] * (pp - 1)))
