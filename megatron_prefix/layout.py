"""Where each rank stands in a model's grid: pure arithmetic, no torch.

Megatron's rank order "tp-cp-ep-dp-pp": tensor-parallel neighbours are next to each other, then
those that share a microbatch's tokens (context parallel), pipeline stages are furthest apart. The
experts of a mixture see the same ranks of a stage as a grid of their own: expert tensor parallel,
expert parallel, expert data parallel.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_prefix.config import ModelConfig

# Rows of a vocabulary shard are a multiple of this: 16 bytes in bf16, what tensor cores want.
VOCAB_ALIGNMENT = 8


def saved_layout(state: Mapping[str, Any]) -> dict[str, int]:
    """A checkpoint's :attr:`Layout.record`, out of its run state; of older ones, which had a list,
    without what that did not say."""
    saved = state.get("layout") or {}
    return saved if isinstance(saved, dict) else dict(zip(("tp", "dp", "pp"), saved, strict=True))


@dataclass(frozen=True)
class Layout:
    """One model's grid over ``tp * cp * dp * pp`` ranks from ``first_rank`` on; a stage's
    ``tp * cp * dp`` ranks are also ``expert_tp * ep * expert_dp``."""

    tp: int
    dp: int
    pp: int
    ep: int = 1
    etp: int = 0  # tensor parallel of the experts; 0: as tp
    first_rank: int = 0  # above 0 for a model beside another in one world
    cp: int = 1  # ranks that share the tokens of a microbatch

    @property
    def world_size(self) -> int:
        return self.tp * self.replicas * self.pp

    @property
    def record(self) -> dict[str, int]:
        """What a checkpoint keeps of it; JSON-ready."""
        own = {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}
        return own | {"ep": self.ep, "etp": self.expert_tp}

    def was_saved(self, saved: Mapping[str, int]) -> bool:
        """Whether :func:`saved_layout` is this one's."""
        own = self.record
        return bool(saved) and saved == {name: own[name] for name in saved}

    @property
    def replicas(self) -> int:
        """Ranks that hold the same dense parameters."""
        return self.cp * self.dp

    @property
    def expert_tp(self) -> int:
        return self.etp or self.tp

    @property
    def expert_dp(self) -> int:
        return self.tp * self.replicas // (self.expert_tp * self.ep)

    @property
    def ranks(self) -> range:
        """The global ranks that hold a part of the model."""
        return range(self.first_rank, self.first_rank + self.world_size)

    def rank(self, tp: int, dp: int, pp: int, cp: int = 0) -> int:
        return self.first_rank + tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def coordinates(self, rank: int) -> tuple[int, int, int]:
        """(tp, dp, pp) of a global rank of :attr:`ranks`."""
        own, stage = rank - self.first_rank, self.tp * self.replicas
        return own % self.tp, own // (self.tp * self.cp) % self.dp, own // stage

    def context_rank(self, rank: int) -> int:
        """Which of the ``cp`` ranks that share a microbatch's tokens a global rank is."""
        return (rank - self.first_rank) // self.tp % self.cp

    def replica_rank(self, rank: int) -> int:
        """Which of the :attr:`replicas` of its dense parameters a global rank is."""
        return (rank - self.first_rank) // self.tp % self.replicas

    def expert_coordinates(self, rank: int) -> tuple[int, int, int]:
        """(expert tp, ep, expert dp) of a global rank within its pipeline stage."""
        inside, tp = (rank - self.first_rank) % (self.tp * self.replicas), self.expert_tp
        return inside % tp, inside // tp % self.ep, inside // (tp * self.ep)

    def last_stage(self, dp: int) -> tuple[int, ...]:
        """Global ranks of the last pipeline stage of one replica, in their order; tensor-parallel
        neighbours are next to each other."""
        first = self.rank(0, dp, self.pp - 1)
        return tuple(range(first, first + self.tp * self.cp))


def model_layout(model: ModelConfig, world_size: int, first_rank: int = 0) -> Layout:
    """The grid of ``model`` over ``world_size`` ranks; ValueError where it does not divide."""
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    cp = model.context_parallel_size
    per_replica = tp * cp * pp
    if world_size % per_replica:
        parts, sizes = ("*context", f"{tp}*{cp}*{pp}") if cp > 1 else ("", f"{tp}*{pp}")
        raise ValueError(
            f"world size {world_size} is no multiple of tensor{parts}*pipeline parallel = {sizes}; "
            f"start {math.ceil(world_size / per_replica) * per_replica} ranks"
        )
    layout = Layout(
        tp=tp,
        dp=world_size // per_replica,
        pp=pp,
        ep=model.expert_model_parallel_size,
        etp=model.expert_tensor_parallel_size,
        first_rank=first_rank,
        cp=cp,
    )
    if tp * layout.replicas % (layout.expert_tp * layout.ep):
        least = least_world_size(model)
        raise ValueError(
            f"world size {world_size}: the {tp * layout.replicas} ranks of a pipeline stage are "
            f"no multiple of expert tensor*expert parallel = {layout.expert_tp}*{layout.ep}; "
            f"start {math.ceil(world_size / least) * least} ranks"
        )
    return layout


def least_world_size(model: ModelConfig) -> int:
    """The least ranks that hold ``model``; every world that holds it is a multiple of this."""
    tp = model.tensor_model_parallel_size
    experts = (model.expert_tensor_parallel_size or tp) * model.expert_model_parallel_size
    return math.lcm(tp * model.context_parallel_size, experts) * model.pipeline_model_parallel_size


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
