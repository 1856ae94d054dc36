"""A real server as the teacher: its log-probabilities are those of the same model elsewhere, in
every layout of the student; and what its faults come to."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import torch
from transformers import PreTrainedModel

from megatron_prefix.batch import pack, passages_of, plan_microbatches
from megatron_prefix.config import ModelConfig, TeacherServerConfig
from megatron_prefix.mcore.cpu import adapt_to_cpu
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.scorer import Scorer
from megatron_prefix.rollout.scoring import Passage, Vocabulary
from megatron_prefix.rollout.server import Server
from megatron_prefix.types import Rollout
from tests.distributed.ranks import run_ranks
from tests.server.conftest import VOCABULARY
from tests.server.faulty_peer import faulty_peer
from tests.server.test_scorer import LIMITS, asked_of, canned
from tests.tiny_models import write_tiny_llama

adapt_to_cpu()

from megatron_prefix.mcore.groups import ModelGroups  # noqa: E402
from megatron_prefix.student import Objective, forward_backward  # noqa: E402
from megatron_prefix.teacher import SeveralTeachers, TeacherLost  # noqa: E402
from megatron_prefix.teachers.reach import check_server  # noqa: E402
from megatron_prefix.teachers.server import ServerTeacher  # noqa: E402
from tests.distributed.world import Case, World, model_config, rollouts  # noqa: E402

WHOLE = VOCABULARY - 1  # what leaves one token to the tail
CPU = torch.device("cpu")


@pytest.fixture
def scorer(server: Server, original_weights: None) -> Iterator[Scorer]:
    scorer = Scorer([server.endpoint], LIMITS, WHOLE, "teacher.server")
    yield scorer
    scorer.close()


def a_passage(length: int, first: int, seed: int) -> Passage:
    draw = torch.Generator().manual_seed(seed)
    return Passage(tuple(torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()), first)


def test_row_j_predicts_token_first_plus_j(scorer: Scorer, reference: PreTrainedModel) -> None:
    """More passages than a request holds, more tokens than SGLang takes at a time, a prompt that
    its cache knows already, and one of a single token."""
    passages = [a_passage(length, 1 + length // 2, seed) for seed, length in enumerate([2, 9, 40])]
    passages += [a_passage(300, 250 - seed, seed) for seed in range(20)]
    passages += [replace(passages[-1], first=100), replace(passages[-1], first=1)]
    for passage, rows in zip(passages, scorer.submit(passages).result(), strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([passage.ids])).logits[0, passage.first - 1 : -1]
        wanted = logits.log_softmax(-1)
        assert rows.ids.shape == (passage.scored, WHOLE)
        found = torch.from_numpy(rows.logprobs)
        named = wanted.gather(1, torch.from_numpy(rows.ids).long())
        torch.testing.assert_close(found, named, rtol=0, atol=2e-5)
        assert (found.diff() <= 0).all()


@dataclass(frozen=True)
class Step:
    loss: float
    kl: torch.Tensor
    grad_norm: float


def _step(case: Case, world_size: int, endpoint: Endpoint | None, top_k: int) -> Step:
    """With the teacher beside the student, or at ``endpoint``."""
    world = World.build(case, world_size)
    sampled = rollouts(vocab=VOCABULARY)
    if endpoint is None:
        sums = world.step(sampled)
        return Step(sums.loss, sums.kl, world.student.update().grad_norm)
    groups = world.student.model.groups
    scorer = Scorer([endpoint], LIMITS, top_k, "teacher.server") if groups.counts else None
    vocabulary = Vocabulary(VOCABULARY, VOCABULARY)
    teacher = ServerTeacher(scorer, groups, vocabulary, top_k, CPU)
    plan = plan_microbatches(sampled, 4, multiple=8)
    mine = plan.of_replica(groups.dp_rank, groups.layout.dp)
    batches = [pack(sampled, plan, m, CPU) for m in mine]
    objective = Objective(world.objective.loss, None, common_vocabulary={"": VOCABULARY})
    targets = teacher.targets(sampled, plan)
    sums = forward_backward(world.student, batches, targets, objective, 17)
    if scorer is not None:
        scorer.close()
    return Step(sums.loss, sums.kl, world.student.update().grad_norm)


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llama"), seed=3, vocab_size=VOCABULARY + 4)


def test_all_but_one_of_the_tokens_give_the_colocated_teachers_step_in_every_layout(
    server: Server, original_weights: None, model_folder: Path, student_folder: Path
) -> None:
    """The student has four more rows, which are no tokens: neither loss counts them. The likelihood
    of the one token in the tail is what 99 fp32 log-probabilities leave over."""
    teacher = model_config(model_folder)
    (alone,) = run_ranks(1, _step, Case(model_config(student_folder), teacher), 1, None, 0)
    assert alone.loss > 0.1 and alone.grad_norm > 0.1
    for layout in ({}, {"tp": 2}, {"pp": 2}):
        ranks = 2 if layout else 1
        case = Case(model_config(student_folder, **layout), teacher)
        for found in run_ranks(ranks, _step, case, ranks, server.endpoint, WHOLE):
            assert found.loss == pytest.approx(alone.loss, rel=1e-4)
            assert found.grad_norm == pytest.approx(alone.grad_norm, rel=5e-4)
            torch.testing.assert_close(found.kl, alone.kl, rtol=1e-4, atol=1e-6)
    case = Case(model_config(student_folder), teacher)
    for found in run_ranks(2, _step, case, 2, server.endpoint, 8):
        assert 0.1 * alone.loss < found.loss < alone.loss  # a coarser partition, a smaller KL


def _mixed_step(case: Case, endpoint: Endpoint) -> Step:
    """Every other rollout is taught by the servers, the others beside the student."""
    world = World.build(case, 1)
    sampled = [
        replace(rollout, domain="far" if index % 2 else "")
        for index, rollout in enumerate(rollouts(vocab=VOCABULARY))
    ]
    groups, scorer = world.student.model.groups, Scorer([endpoint], LIMITS, WHOLE, "far")
    vocabulary = Vocabulary(VOCABULARY, VOCABULARY)
    far = ServerTeacher(scorer, groups, vocabulary, WHOLE, CPU, "far")
    plan = plan_microbatches(sampled, 4, multiple=8)
    batches = [pack(sampled, plan, m, CPU) for m in range(len(plan))]
    objective = replace(world.objective, common_vocabulary={"far": VOCABULARY})
    targets = SeveralTeachers({"": world.teacher, "far": far}, groups).targets(sampled, plan)
    sums = forward_backward(world.student, batches, targets, objective, 17)
    scorer.close()
    return Step(sums.loss, sums.kl, world.student.update().grad_norm)


def test_one_of_several_teachers_may_be_behind_servers(
    server: Server, original_weights: None, model_folder: Path, student_folder: Path
) -> None:
    case = Case(model_config(student_folder), model_config(model_folder))
    (alone,) = run_ranks(1, _step, case, 1, None, 0)
    (mixed,) = run_ranks(1, _mixed_step, case, server.endpoint)
    assert mixed.loss == pytest.approx(alone.loss, rel=1e-4)
    assert mixed.grad_norm == pytest.approx(alone.grad_norm, rel=5e-4)


def test_an_answer_without_sense_ends_the_step_at_once_with_its_words() -> None:
    sampled = [Rollout((3, 4), (5, 6), (0.0, 0.0), "length", 0, 0)]
    plan = plan_microbatches(sampled, 1)
    (passage,) = passages_of(sampled, plan, 0)
    twice = json.loads(canned(passage, 3))
    ids = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"  # six zeros
    twice[0]["meta_info"]["input_top_logprobs_idx_flat_b64"] = ids
    null = json.dumps([{"meta_info": {"input_top_logprobs": [None]}}])
    for answer, words in ((null, "cannot be used"), (json.dumps(twice), "is an id twice in a row")):
        with faulty_peer([(200, answer)]) as peer:
            with pytest.raises(RuntimeError) as error:
                run_ranks(1, _targets, peer.url, sampled)
        told = str(error.value)
        assert "TeacherLost: no top-k tokens of microbatch 0 from the teacher" in told
        assert words in told


def _targets(url: str, sampled: list[Rollout]) -> int:
    from megatron_prefix.layout import Layout
    from megatron_prefix.mcore.groups import build_groups, initialize_megatron

    initialize_megatron(1)
    scorer = asked_of(url)
    groups = build_groups(Layout(tp=1, dp=1, pp=1))
    teacher = ServerTeacher(scorer, groups, Vocabulary(50, 50), 3, CPU)
    try:
        return len(list(teacher.targets(sampled, plan_microbatches(sampled, 1))))
    finally:
        scorer.close()


def test_two_ranks_fail_alike_where_the_one_that_asks_has_no_answer() -> None:
    sampled = [Rollout((3, 4), (5, 6), (0.0, 0.0), "length", 0, 0)]
    padding = [replace(sampled[0], prefix_ids=(5, 60))]
    with faulty_peer([(400, '{"error": {"message": "no such thing"}}')]) as peer:
        first, second = run_ranks(2, _failures, peer.url, [padding, sampled])
    assert "token 60 of a rollout is none of the teacher's 50" in first[0]
    assert "no such thing" in first[1]
    assert all("the rank that asks the servers had no answer" in told for told in second)


def _failures(url: str, steps: list[list[Rollout]]) -> list[str]:
    from megatron_prefix.layout import Layout
    from megatron_prefix.mcore.groups import build_groups, initialize_megatron

    initialize_megatron(1)
    groups = build_groups(Layout(tp=2, dp=1, pp=1))
    scorer = asked_of(url) if groups.counts else None
    teacher = ServerTeacher(scorer, groups, Vocabulary(50, 50), 3, CPU)
    told = []
    for sampled in steps:
        with pytest.raises(TeacherLost) as error:
            list(teacher.targets(sampled, plan_microbatches(sampled, 1)))
        told.append(str(error.value))
    if scorer is not None:
        scorer.close()
    return told


def test_a_microbatch_without_a_scored_token_has_targets_where_the_others_are() -> None:
    elsewhere = torch.device("meta")
    teacher = ServerTeacher(None, cast(ModelGroups, None), Vocabulary(50, 50), 3, elsewhere)
    targets = teacher._take(0, None, 0)
    assert targets.ids.shape == targets.logprobs.shape == (0, 3)
    assert targets.ids.device == targets.logprobs.device == elsewhere


def test_a_server_of_another_model_is_named_at_the_start(
    server: Server, original_weights: None, model_folder: Path, student_folder: Path
) -> None:
    endpoint = replace(server.endpoint, timeout_s=60.0)
    proof = TeacherServerConfig(verify_weights=True)
    config = ModelConfig(str(model_folder), placement="server", params_dtype="fp32", server=proof)
    check_server(endpoint, config, "teacher")
    other = replace(config, hf_path=str(student_folder))
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM.*LlamaForCausalLM.*give the folder"):
        check_server(endpoint, other, "teacher")


def test_a_server_of_other_weights_is_named_where_they_are_to_be_verified(
    server: Server, original_weights: None, model_folder: Path, tmp_path: Path
) -> None:
    from tests.tiny_models import write_tiny_qwen3

    folder = write_tiny_qwen3(tmp_path, seed=9, vocab_size=VOCABULARY, max_position_embeddings=2048)
    proof = TeacherServerConfig(verify_weights=True)
    config = ModelConfig(str(folder), placement="server", params_dtype="fp32", server=proof)
    with pytest.raises(Exception, match="does not hold the published weights: model.embed_tokens"):
        check_server(server.endpoint, config, "teacher")
