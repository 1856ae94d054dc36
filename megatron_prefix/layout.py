"""Where each rank stands in a model's grid: pure arithmetic, no torch.

Megatron's rank order "tp-cp-ep-dp-pp": tensor-parallel neighbours are next to each other,
pipeline stages are furthest apart.
"""

import math
from dataclasses import dataclass

from megatron_prefix.config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """One model's grid over ``tp * dp * pp`` ranks."""

    tp: int
    dp: int
    pp: int

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.pp

    def rank(self, tp: int, dp: int, pp: int) -> int:
        return tp + self.tp * (dp + self.dp * pp)

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp, dp, pp) of a global rank."""
        return rank % self.tp, rank // self.tp % self.dp, rank // (self.tp * self.dp)

    def last_stage(self, dp: int) -> tuple[int, ...]:
        """Global ranks of the last pipeline stage of one replica, in tensor-parallel order."""
        return tuple(self.rank(tp, dp, self.pp - 1) for tp in range(self.tp))


def model_layout(model: ModelConfig, world_size: int) -> Layout:
    """The grid of ``model`` over ``world_size`` ranks; ValueError where it does not divide."""
    per_replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    if world_size % per_replica:
        raise ValueError(
            f"world size {world_size} is no multiple of tensor*pipeline parallel = "
            f"{model.tensor_model_parallel_size}*{model.pipeline_model_parallel_size}; "
            f"start {math.ceil(world_size / per_replica) * per_replica} ranks"
        )
    return Layout(
        tp=model.tensor_model_parallel_size,
        dp=world_size // per_replica,
        pp=model.pipeline_model_parallel_size,
    )


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
