"""Stop tokens in the teacher's distribution: their log-probabilities, and a mapping's exchange."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_prefix.mcore.stop_map import exchange_rows
from megatron_prefix.types import Rollout
from megatron_prefix.weighing.prefix_sums import PrefixSums
from tests.distributed.dense import Dense, reverse_kl
from tests.distributed.ranks import run_ranks
from tests.distributed.world import Case, World, model_config, rollouts

OURS, THEIRS = 5, 60  # over two ranks in two shards of the vocabulary


def ended() -> list[Rollout]:
    """Every second rollout ends with a stop token, the others at the prefix length."""
    return [
        replace(each, prefix_ids=(*each.prefix_ids[:-1], OURS), finish_reason="stop")
        if index % 2
        else each
        for index, each in enumerate(rollouts())
    ]


def step(case: Case, world_size: int, mapped: bool) -> PrefixSums:
    world = World.build(case, world_size)
    head = world.objective.teacher_head
    if mapped and head is not None:
        teacher, student = world.teacher._model.hf, world.student.model
        exchange_rows(head.weight, teacher, student.groups.tp_rank, {THEIRS: OURS})
    return world.step(ended())


def expected(folders: tuple[Path, Path], mapped: bool) -> tuple[float, float]:
    """Mean KL over all tokens, and the sum over stop tokens of the difference; fp64."""
    dense = Dense.load(folders)
    kl, tokens, stops = 0.0, 0, 0.0
    for each in ended():
        with torch.no_grad():
            log_p, log_q = dense.logprobs(each)
        if mapped:
            log_q[:, [OURS, THEIRS]] = log_q[:, [THEIRS, OURS]]
        kl += float(reverse_kl(log_p, log_q).sum())
        tokens += len(each.prefix_ids)
        if each.finish_reason == "stop":
            stops += float(log_p[-1, OURS] - log_q[-1, OURS])
    return kl / tokens, stops


@pytest.mark.parametrize("mapped", [False, True], ids=["alike", "mapped"])
@pytest.mark.parametrize(
    ("world_size", "student"), [(1, (1, 1)), (2, (2, 1)), (2, (1, 1))], ids=["one", "tp2", "dp2"]
)
def test_stop_tokens_are_scored_as_transformers_scores_them(
    folders: tuple[Path, Path], world_size: int, student: tuple[int, int], mapped: bool
) -> None:
    case = Case(model_config(folders[0], *student), model_config(folders[1]))
    loss, difference = expected(folders, mapped)
    for sums in run_ranks(world_size, step, case, world_size, mapped):
        assert sums.stops == sum(each.finish_reason == "stop" for each in ended())
        assert sums.stop_diff == pytest.approx(difference, rel=1e-5, abs=1e-5)
        assert sums.loss == pytest.approx(loss, rel=1e-5)
