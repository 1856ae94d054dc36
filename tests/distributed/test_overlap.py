"""The overlap of the models' likeliest tokens: against dense sets, over shards, in every layout."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron_prefix.loss import prefix_divergence
from megatron_prefix.loss.overlap import TopKOverlap
from megatron_prefix.student import forward_backward
from megatron_prefix.weighing.prefix_sums import PrefixSums
from megatron_prefix.weighing.token_kl import by_rollout
from tests.distributed import world as worlds
from tests.distributed.ranks import run_ranks
from tests.distributed.world import CPU, LONGEST_PREFIX, World, model_config
from tests.tiny_models import write_tiny_qwen3
from tests.unit.loss.reference import Case, make_case

ROWS, REAL = 204, 103  # with four ranks the last shard holds no real row, the third one
K = 5


def shares(student_logits: Tensor, teacher_logits: Tensor, k: int = K) -> Tensor:
    """By sets, [N]."""
    pairs = zip(
        student_logits.topk(k).indices.tolist(),
        teacher_logits.topk(k).indices.tolist(),
        strict=True,
    )
    return torch.tensor([len(set(a) & set(b)) / k for a, b in pairs])


def on_rank(case: Case, divergence: str, k: int) -> tuple[Tensor, Tensor]:
    """The shares, and the loss beside them."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    heads = [w.chunk(ranks)[rank].clone() for w in (case.student_weight, case.teacher_weight)]
    overlap = TopKOverlap(k, len(case.student_hidden), REAL, CPU)
    result = prefix_divergence(
        case.student_hidden.clone().requires_grad_(),
        heads[0].requires_grad_(),
        case.teacher_hidden,
        heads[1],
        case.token_weight,
        divergence,
        0.3,
        vocab_size=REAL,
        tp_group=dist.group.WORLD,
        chunk_size=10,
        overlap=overlap,
    )
    return overlap.shares(dist.group.WORLD), result.loss.detach()


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "relaxed_kl"])
def test_shards_find_the_sets_of_the_whole_vocabulary(divergence: str) -> None:
    case = make_case(rows=ROWS)
    near = case.teacher_weight[:, :24] * 0.5 + case.student_weight
    case = replace(case, teacher_hidden=case.student_hidden.clone(), teacher_weight=near)
    student = case.student_hidden @ case.student_weight[:REAL].T
    teacher = case.teacher_hidden @ case.teacher_weight[:REAL].T
    expected = shares(student, teacher)
    assert 0.1 < expected.mean() < 0.9 and len(expected.unique()) > 3
    for world_size in (1, 4):
        for seen, _ in run_ranks(world_size, on_rank, case, divergence, K):
            torch.testing.assert_close(seen, expected)
    ((everything, loss),) = run_ranks(1, on_rank, case, divergence, 500)  # more than there are
    assert (everything == 1.0).all()
    assert loss == run_ranks(1, on_rank, case, divergence, 1)[0][1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 62, "num_key_value_heads": 4}
    student = write_tiny_qwen3(root / "student", num_hidden_layers=2, **sizes)
    return student, write_tiny_qwen3(root / "teacher", hidden_size=96, seed=3, **sizes)


def step(case: worlds.Case, world_size: int) -> tuple[list[np.ndarray], PrefixSums]:
    world, sampled = World.build(case, world_size), worlds.rollouts()
    plan, batches = world.packed(sampled)
    objective = replace(world.objective, overlap_k=K, keeps="overlap")
    targets, kept = world.teacher.targets(sampled, plan), list[Tensor]()
    sums = forward_backward(world.student, batches, targets, objective, LONGEST_PREFIX, kept)
    return by_rollout(world.student.model.groups, plan, sampled, kept, CPU), sums


def test_by_position_and_by_rollout_in_every_layout(folders: tuple[Path, Path]) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    student, teacher = (load(folder, dtype=torch.float32) for folder in folders)
    expected, total = [], np.zeros(LONGEST_PREFIX)
    for rollout in worlds.rollouts():
        ids = torch.tensor([(*rollout.prompt_ids, *rollout.prefix_ids)[:-1]])
        first = len(rollout.prompt_ids) - 1
        pair = (model(ids).logits[0, first:].detach() for model in (student, teacher))
        expected.append(shares(*pair).numpy())
        total[: len(expected[-1])] += expected[-1]
    for world_size, ours, theirs in ((1, (1, 1), (1, 1)), (2, (2, 1), (1, 2)), (2, (1, 2), (2, 1))):
        case = worlds.Case(model_config(folders[0], *ours), model_config(folders[1], *theirs))
        for by_token, sums in run_ranks(world_size, step, case, world_size):
            np.testing.assert_allclose(sums.overlap.numpy(), total, rtol=1e-6)
            for seen, wanted in zip(by_token, expected, strict=True):
                np.testing.assert_allclose(seen, wanted, rtol=1e-6)
