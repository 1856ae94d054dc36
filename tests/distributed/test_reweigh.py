"""Weighted tokens on the ranks: gradients against transformers, and the same in every layout."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_prefix.config import LossConfig, TokenWeightConfig
from megatron_prefix.loss.teacher_view import TeacherView
from megatron_prefix.student import Objective, forward_backward
from megatron_prefix.types import Rollout, TopKTargets
from megatron_prefix.weighing.reweigh import reweigh, view_of_top_k
from megatron_prefix.weighing.token_weights import raw_weights
from tests.distributed.dense import Dense, reverse_kl
from tests.distributed.ranks import run_ranks
from tests.distributed.world import (
    LONGEST_PREFIX,
    Case,
    World,
    model_config,
    rollouts,
)
from tests.tiny_models import write_tiny_qwen3

NORM = "decoder.final_layernorm.weight"
RULES = {
    "discrepancy": TokenWeightConfig("discrepancy", scale=3.0, floor=0.1),
    "change_point": TokenWeightConfig("change_point", min_tokens=3, strength=0.05),
}
LAYOUT_RULES = RULES | {"entropy": TokenWeightConfig("entropy", share=0.3)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 62, "num_key_value_heads": 4}
    student = write_tiny_qwen3(root / "student", num_hidden_layers=2, **sizes)
    wide = {"hidden_size": 96, "initializer_range": 0.2, "seed": 3}
    return student, write_tiny_qwen3(root / "teacher", **wide, **sizes)


def sampled(logprob: float = -3.5) -> list[Rollout]:
    """With log-probabilities as if the student had found each token likely."""
    return [
        replace(rollout, rollout_logprobs=(logprob,) * len(rollout.prefix_ids))
        for rollout in rollouts()
    ]


def weighted_step(
    case: Case, world_size: int, config: TokenWeightConfig, logprob: float = -3.5
) -> tuple[float, float, float, float, torch.Tensor | None]:
    """Loss, gradient norm, effective share, the weights' sum on this rank, and the last norm's
    gradient."""
    world = World.build(case, world_size)
    rollouts = sampled(logprob)
    plan, batches = world.packed(rollouts)
    targets = world.teacher.targets(rollouts, plan)
    weighted = reweigh(world.student.model, batches, targets, world.objective, config)
    sums = forward_backward(
        world.student, weighted.batches, targets, world.objective, LONGEST_PREFIX
    )
    total = sum(float(batch.token_weight.sum()) for batch in weighted.batches)
    named = dict(world.student.model.module.named_parameters())
    gradient = named[NORM].main_grad.clone() if NORM in named and world_size == 1 else None
    norm = world.student.update().grad_norm
    return sums.loss, norm, weighted.effective_share, total, gradient


def reference_weights(
    config: TokenWeightConfig, rollout: Rollout, teacher_logprobs: torch.Tensor
) -> torch.Tensor:
    """fp64 [L] from fp64 [L, V]."""
    labels, sampled = torch.tensor(rollout.prefix_ids), torch.tensor(rollout.rollout_logprobs)
    label = teacher_logprobs.gather(1, labels[:, None])[:, 0]
    if config.rule == "reward":  # the loss's mixture is 0.2
        return (label - sampled >= math.log(0.25)).double()
    best = teacher_logprobs.topk(2, dim=1).values
    return raw_weights(config, torch.arange(len(labels)), sampled, label, best[:, 0] - best[:, 1])


@pytest.mark.parametrize("rule", [*RULES, "reward"])
def test_gradients_are_those_of_the_weighted_mean(folders: tuple[Path, Path], rule: str) -> None:
    case = Case(*map(model_config, folders))
    config = RULES.get(rule, TokenWeightConfig("reward"))
    ((loss, _, share, total, gradient),) = run_ranks(1, weighted_step, case, 1, config)
    dense = Dense.load(folders)
    kl, weights = [], []
    for rollout in sampled():
        log_p, log_q = dense.logprobs(rollout)
        kl.append(reverse_kl(log_p, log_q))
        weights.append(reference_weights(config, rollout, log_q))
    weight = torch.cat(weights)
    assert weight.min() < 0.5 < weight.max()
    expected = (torch.cat(kl) * weight).sum() / weight.sum()
    expected.backward()
    assert total == pytest.approx(1.0, abs=1e-6)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert share == pytest.approx(
        float(weight.sum() ** 2 / (len(weight) * weight.square().sum())), rel=1e-5
    )
    reference = dense.student.model.norm.weight.grad
    assert gradient is not None
    assert (gradient.double() - reference).norm() <= 1e-5 * reference.norm()


def test_a_step_of_which_a_rule_leaves_nothing_is_learnt_from_evenly(
    folders: tuple[Path, Path],
) -> None:
    """As if the student had been certain of every token, and the teacher of none."""
    case, config = Case(*map(model_config, folders)), TokenWeightConfig("reward")
    ((loss, norm, share, total, _),) = run_ranks(1, weighted_step, case, 1, config, 0.0)
    assert math.isfinite(loss) and norm > 0.0
    assert (share, total) == (1.0, pytest.approx(1.0, abs=1e-6))


def test_the_least_sure_tokens_alone_are_learnt_from(folders: tuple[Path, Path]) -> None:
    case, config = Case(*map(model_config, folders)), LAYOUT_RULES["entropy"]
    ((loss, _, share, total, gradient),) = run_ranks(1, weighted_step, case, 1, config)
    dense = Dense.load(folders)
    kl, entropy = [], []
    for rollout in sampled():
        log_p, log_q = dense.logprobs(rollout)
        kl.append(reverse_kl(log_p, log_q))
        entropy.append(-(log_p.exp() * log_p).sum(-1).detach())
    count = math.ceil(config.share * len(torch.cat(kl)))
    expected = torch.cat(kl)[torch.cat(entropy).topk(count).indices].mean()
    expected.backward()
    assert total == pytest.approx(1.0, abs=1e-6)
    assert share == pytest.approx(count / len(torch.cat(kl)))
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    reference = dense.student.model.norm.weight.grad
    assert gradient is not None
    assert (gradient.double() - reference).norm() <= 1e-5 * reference.norm()


@pytest.mark.parametrize("rule", LAYOUT_RULES)
@pytest.mark.parametrize(
    ("student", "teacher"),
    [((1, 1), (1, 1)), ((2, 1), (1, 2)), ((1, 2), (2, 1))],
    ids=["dp2", "tp2, teacher pp2", "pp2, teacher tp2"],
)
def test_weights_are_the_same_in_every_layout(
    folders: tuple[Path, Path], student: tuple[int, int], teacher: tuple[int, int], rule: str
) -> None:
    config, one_case = LAYOUT_RULES[rule], Case(*map(model_config, folders))
    case = Case(model_config(folders[0], *student), model_config(folders[1], *teacher))
    ((loss, norm, share, _, _),) = run_ranks(1, weighted_step, one_case, 1, config)
    for seen in run_ranks(2, weighted_step, case, 2, config):
        assert seen[0] == pytest.approx(loss, rel=1e-6)
        assert seen[1] == pytest.approx(norm, rel=3e-6)
        assert seen[2] == pytest.approx(share, rel=1e-6)


def test_a_teacher_that_names_all_tokens_is_seen_as_one_with_a_whole_softmax() -> None:
    logprobs = torch.randn(9, 20, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    labels, order = torch.arange(9), logprobs.argsort(dim=1, descending=True)

    def view(k: int) -> TeacherView:
        ids = order[:, :k]
        return view_of_top_k(TopKTargets(ids, logprobs.gather(1, ids)), labels, 20)

    best = logprobs.double().topk(2, dim=1).values
    torch.testing.assert_close(view(20).margin, best[:, 0] - best[:, 1])
    torch.testing.assert_close(view(5).margin, view(20).margin)
    exact = logprobs.double().gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(view(20).label_logprobs, exact)
    named = (order[:, :5] == labels[:, None]).any(1)
    torch.testing.assert_close(view(5).label_logprobs[named], exact[named])
    unnamed = view(5).label_logprobs[~named].exp() * 15  # evenly over the fifteen others
    left = 1.0 - logprobs.double().gather(1, order[:, :5]).exp().sum(1)
    torch.testing.assert_close(unnamed, left[~named])


def test_the_tail_of_a_teacher_of_top_k_ends_with_the_tokens_that_both_models_have() -> None:
    objective = Objective(LossConfig(), None, common_vocabulary={"far": 50})
    assert objective.tokens_shared("far", 64) == 50
    assert objective.tokens_shared("", 64) == 64
