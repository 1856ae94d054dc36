"""One ProcessGroupCollection a model, so that two models of unlike layouts share one process."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.hyper_comm_grid import HyperCommGrid
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import distributed_c10d as c10d
from torch.distributed.constants import default_pg_timeout

from megatron_prefix.layout import Layout


@dataclass(frozen=True)
class ModelGroups:
    """A model's grid, its process groups, and where this rank stands in it."""

    layout: Layout
    pg: ProcessGroupCollection
    tp_rank: int
    dp_rank: int
    pp_rank: int
    ep_rank: int = 0
    expert_tp_rank: int = 0
    expert_dp_rank: int = 0
    cp_rank: int = 0
    replica_rank: int = 0  # among those that hold the same dense parameters

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.layout.pp - 1

    @property
    def counts(self) -> bool:
        """Whether this rank speaks for its replica when metrics are summed over the world."""
        return self.counts_own_tokens and self.cp_rank == 0

    @property
    def counts_own_tokens(self) -> bool:
        """As :attr:`counts`, of what each context-parallel rank knows of its own tokens alone."""
        return self.is_last_stage and self.tp_rank == 0


def initialize_megatron(seed: int, timeout: timedelta = default_pg_timeout) -> None:
    """Megatron's process-wide state that explicit groups do not replace: buffers and RNG.

    ``timeout`` is that of the process-wide groups' collectives, which nothing of ours asks for.
    """
    parallel_state.initialize_model_parallel(
        # Megatron makes a timedelta of it, which takes parts of a minute as well.
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
        create_gloo_process_groups=False,  # nothing asks for them, and one would ignore the timeout
    )
    model_parallel_cuda_manual_seed(seed)


def build_groups(layout: Layout) -> ModelGroups:
    """Create every group of ``layout``, which covers this rank. Collective as
    :func:`create_groups` is."""
    groups = create_groups(layout)
    assert groups is not None
    return groups


def create_groups(layout: Layout, timeout: timedelta = default_pg_timeout) -> ModelGroups | None:
    """Create every group of ``layout``; None on a rank that is not in it. Collective over the
    world: all ranks call it for the same layouts in the same order.

    A collective in them that is not over after ``timeout`` ends its rank (NCCL) or raises (gloo).
    """
    sizes = [layout.tp, layout.cp, layout.dp, layout.pp]
    grid = HyperCommGrid(sizes, ["tp", "cp", "dp", "pp"], rank_offset=layout.first_rank)
    pg, rank = _collection(grid, layout, timeout), dist.get_rank()
    if rank not in layout.ranks:
        return None
    tp, dp, pp = layout.coordinates(rank)
    etp, ep, edp = layout.expert_coordinates(rank)
    cp, replica = layout.context_rank(rank), layout.replica_rank(rank)
    return ModelGroups(layout, pg, tp, dp, pp, ep, etp, edp, cp, replica)


@contextlib.contextmanager
def world_of(groups: ModelGroups) -> Iterator[None]:
    """Within the block, a model's ranks are torch's default group. Not collective.

    Megatron's optimizer and checkpoints exchange what they know over the default group, and so
    does whatever else asks for "all ranks": of the student, where a teacher has ranks of its own
    in the world. The first ranks keep their numbers, so the model must stand on those.
    """
    assert groups.layout.first_rank == 0
    whole = dist.group.WORLD
    c10d._update_default_pg(groups.pg.intra_dist_opt)
    try:
        yield
    finally:
        c10d._update_default_pg(whole)


def _collection(grid: HyperCommGrid, layout: Layout, timeout: timedelta) -> ProcessGroupCollection:
    pg = ProcessGroupCollection()
    for name in ("tp", "pp", "cp", "dp"):
        setattr(pg, name, grid.create_pg(name, timeout=timeout))
    pg.mp = grid.create_pg(["tp", "pp"], timeout=timeout)
    pg.tp_cp = grid.create_pg(["tp", "cp"], timeout=timeout)
    pg.dp_cp = grid.create_pg(["cp", "dp"], timeout=timeout)
    pg.tp_dp_cp = grid.create_pg(["tp", "cp", "dp"], timeout=timeout)
    pg.intra_dist_opt = grid.create_pg(["tp", "cp", "dp", "pp"], timeout=timeout)
    _add_expert_groups(pg, grid, layout, timeout)
    pg.dp_cp_gtp_remat, pg.expt_dp_gtp_remat = pg.dp_cp, pg.expt_dp
    pg.tp_ep_pp_with_egtp_remat = pg.tp_ep_pp
    pg.intra_dp_cp, pg.intra_expt_dp = pg.dp_cp, pg.expt_dp
    # Megatron tells "not set" from "none wanted": these are none.
    pg.inter_dist_opt = pg.hcp = pg.gtp_remat = pg.expt_gtp_remat = None
    pg.dp_cp_ag = pg.expt_dp_ag = None
    pg.embd, pg.pos_embd = _embedding_groups(grid, timeout)
    return pg


def _add_expert_groups(
    pg: ProcessGroupCollection, grid: HyperCommGrid, layout: Layout, timeout: timedelta
) -> None:
    if layout.ep == layout.cp == 1 and layout.expert_tp == layout.tp:
        # The expert groups are the dense ones with one expert-parallel rank.
        pg.ep, pg.expt_tp, pg.expt_dp = pg.cp, pg.tp, pg.dp
        pg.tp_ep, pg.tp_ep_pp = pg.tp_cp, pg.mp
        return
    grid.register_view(
        "expert",
        [layout.expert_tp, layout.ep, layout.expert_dp, layout.pp],
        ["expt_tp", "ep", "expt_dp", "pp"],
        shared_dims=["pp"],
    )
    for name in ("ep", "expt_tp", "expt_dp"):
        setattr(pg, name, grid.create_pg(name, view="expert", timeout=timeout))
    pg.tp_ep = grid.create_pg(["expt_tp", "ep"], view="expert", timeout=timeout)
    pg.tp_ep_pp = grid.create_pg(["expt_tp", "ep", "pp"], view="expert", timeout=timeout)


def _embedding_groups(
    grid: HyperCommGrid, timeout: timedelta
) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """First and last stage of each pipeline (they share tied embeddings), and the first alone."""
    rank = dist.get_rank()
    embedding: Any = None
    position: Any = None
    for stages in grid.get_rank_enum("pp"):
        ends = sorted({stages[0], stages[-1]})
        group = dist.new_group(ends, timeout=timeout)
        embedding = group if rank in ends else embedding
        group = dist.new_group([stages[0]], timeout=timeout)
        position = group if rank == stages[0] else position
    return embedding, position
