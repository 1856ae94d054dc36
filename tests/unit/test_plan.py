"""The plan's groups, parameters, bytes and costs, against counts made in another way."""

import io
import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from rich.console import Console

from megatron_prefix.config import (
    DataConfig,
    Fp8Config,
    ModelConfig,
    OptimizerConfig,
    PrefixConfig,
    Recipe,
    TrainConfig,
)
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.hf_folder import read_hf_folder
from megatron_prefix.layout import Layout, padded_vocab_size
from megatron_prefix.loss import Workspace, prefix_divergence
from megatron_prefix.plan import (
    Plan,
    Seen,
    look_at_prompts,
    make_plan,
    rank_groups,
)
from megatron_prefix.plan.activations import kl_workspace
from megatron_prefix.plan.assumptions import assumptions
from megatron_prefix.plan.rank_columns import rank_kinds
from megatron_prefix.plan.view import plan_json, print_plan
from megatron_prefix.prefix import model_shape, step_flops
from megatron_prefix.validate import ValidRun, validate
from tests.tiny_models import write_tiny_llama, write_tiny_qwen3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_qwen3(folder / "student", vocab_size=265)
    write_tiny_llama(folder / "teacher", vocab_size=272, num_hidden_layers=3)
    for name in ("student", "teacher"):
        write_byte_tokenizer(folder / name)
    rows = [json.dumps({"prompt": "x" * length}) for length in (10, 20, 30)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    return Recipe(
        student=ModelConfig(hf_path=str(folder / "student"), params_dtype="fp32"),
        teacher=ModelConfig(hf_path=str(folder / "teacher"), params_dtype="bf16"),
        data=DataConfig(
            path=str(folder / "prompts.jsonl"), max_prompt_length=64, chat_template="never"
        ),
        prefix=PrefixConfig("anchored", 9, 75),
        train=TrainConfig(steps=20, global_batch_size=32, micro_batch_size=4),
    )


def laid_out(
    recipe: Recipe, student: tuple[int, int], teacher: tuple[int, int], world: int = 0
) -> ValidRun:
    def over(model: ModelConfig, sizes: tuple[int, int]) -> ModelConfig:
        tp, pp = sizes
        return replace(model, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)

    return validate(
        replace(
            recipe,
            student=over(recipe.student, student),
            teacher=over(recipe.teacher, teacher),
            run=replace(recipe.run, world_size=world),
        )
    )


def shown(plan: Plan) -> str:
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=100))
    return text.getvalue()


def elements(path: str) -> int:
    total = 0
    for entry in read_hf_folder(path, "student").tensors.values():
        size = 1
        for side in entry.shape:
            size *= side
        total += size
    return total


@pytest.mark.parametrize(("tp", "cp", "dp", "pp"), list(product((1, 2), (1, 2), (1, 2, 3), (1, 2))))
def test_groups_split_the_world_with_tensor_parallel_neighbours(
    tp: int, cp: int, dp: int, pp: int
) -> None:
    layout = Layout(tp=tp, dp=dp, pp=pp, cp=cp)
    groups = rank_groups(layout)
    for kind, size in (("tp", tp), ("cp", cp), ("dp", dp), ("pp", pp)):
        assert {len(group) for group in groups[kind]} == {size}
        assert sorted(sum(groups[kind], ())) == list(layout.ranks)
    strides = {"tp": 1, "cp": tp, "dp": tp * cp, "pp": tp * cp * dp}
    for kind, stride in strides.items():
        for group in groups[kind]:
            assert group == tuple(range(group[0], group[0] + stride * len(group), stride))


def test_one_rank_holds_every_parameter_of_the_folder(recipe: Recipe) -> None:
    plan = make_plan(laid_out(recipe, (1, 1), (1, 1)))
    rank = plan.ranks[0]
    student = elements(recipe.student.hf_path)
    assert plan.student.parameters == student
    # Padded to 272 rows of 64: seven more than the vocabulary has.
    assert rank.student_parameters == student + 7 * 64
    assert rank.student_weights == rank.student_gradients == 4 * rank.student_parameters
    assert rank.student_optimizer == 8 * rank.student_parameters
    # The teacher's trunk has no head: untied, 272 rows of 64 in bf16.
    assert rank.teacher_weights == 2 * (elements(recipe.teacher.hf_path) - 272 * 64)
    assert rank.teacher_head == 2 * 272 * 64
    assert rank.held == (
        rank.student_weights
        + rank.student_gradients
        + rank.student_optimizer
        + rank.teacher_weights
        + rank.teacher_head
    )


def test_tensor_parallel_ranks_share_all_but_norms(recipe: Recipe) -> None:
    whole = make_plan(laid_out(recipe, (1, 1), (1, 1))).ranks[0]
    halves = make_plan(laid_out(recipe, (2, 1), (1, 1))).ranks
    norms = 2 * (2 * 64 + 2 * 16) + 64  # two layers of two norms and qk-norms, and the last
    assert [rank.student_parameters for rank in halves] == [
        (whole.student_parameters - norms) // 2 + norms
    ] * 2
    assert [rank.teacher_head for rank in halves] == [whole.teacher_head // 2] * 2


def test_pipeline_stages_sum_up_with_the_tied_head_copied(recipe: Recipe) -> None:
    whole = make_plan(laid_out(recipe, (1, 1), (1, 1)))
    stages = make_plan(laid_out(recipe, (1, 2), (1, 2)))
    together = sum(rank.student_parameters for rank in stages.ranks)
    assert together == whole.ranks[0].student_parameters + 272 * 64
    assert [rank.teacher_head for rank in stages.ranks] == [0, whole.ranks[0].teacher_head]
    teachers = sum(rank.teacher_weights for rank in stages.ranks)
    assert teachers == whole.ranks[0].teacher_weights
    assert stages.teacher.layers_by_stage == (2, 1)


@pytest.mark.parametrize(("dtype", "moments"), [("fp32", 8), ("bf16", 12)])
def test_the_distributed_optimizer_shares_its_state(
    recipe: Recipe, dtype: str, moments: int
) -> None:
    recipe = replace(recipe, student=replace(recipe.student, params_dtype=dtype))
    sharing = make_plan(laid_out(recipe, (1, 1), (1, 1), world=4)).ranks[0]
    alone = replace(recipe, optimizer=OptimizerConfig(use_distributed_optimizer=False))
    keeping = make_plan(laid_out(alone, (1, 1), (1, 1), world=4)).ranks[0]
    assert keeping.student_optimizer == moments * keeping.student_parameters
    assert sharing.student_optimizer == moments * -(-sharing.student_parameters // 4)
    assert sharing.student_weights == keeping.student_weights


@pytest.mark.parametrize(
    ("vocab", "tp", "padded"), [(46, 1, 48), (46, 2, 48), (46, 4, 64), (151936, 8, 151936)]
)
def test_vocabulary_is_padded_to_eight_rows_a_shard(vocab: int, tp: int, padded: int) -> None:
    assert padded_vocab_size(vocab, tp) == padded


def test_costs_are_the_policys_steps_one_by_one(recipe: Recipe) -> None:
    run = laid_out(recipe, (1, 1), (1, 1))
    cost = make_plan(run, Seen(lengths=(10, 20, 30), teacher_lengths=(10, 20, 30))).cost
    shapes = model_shape(run.student.hf.config), model_shape(run.teacher.hf.config)
    lengths = [75 if step % 8 == 7 else 9 for step in range(20)]
    steps = [step_flops(*shapes, [(20, length)] * 32) for length in lengths]
    full = step_flops(*shapes, [(20, 75)] * 32 * 20)
    assert cost.run.flops.total == pytest.approx(sum(step.total for step in steps), rel=1e-12)
    assert cost.run.flops_full.total == pytest.approx(full.total, rel=1e-12)
    assert cost.run.ratio == pytest.approx(sum(s.total for s in steps) / full.total, rel=1e-12)
    assert cost.run.prefix_tokens == 32 * sum(lengths)
    assert (cost.run.full_tokens, cost.run.prompt_tokens) == (32 * 20 * 75, 32 * 20 * 20)
    assert (cost.shortest_prefix, cost.longest_prefix, cost.microbatches_a_replica) == (9, 75, 8)
    assert cost.mean_step_flops == cost.run.flops.total / 20


def test_a_policy_that_moves_with_the_data_is_said_to(recipe: Recipe) -> None:
    adaptive = replace(recipe, prefix=PrefixConfig("adaptive", 9, 75))
    cost = make_plan(laid_out(adaptive, (1, 1), (1, 1))).cost
    assert not cost.lengths_known
    assert (cost.shortest_prefix, cost.longest_prefix) == (9, 9)
    assert make_plan(laid_out(recipe, (1, 1), (1, 1))).cost.lengths_known
    for policy, bound in (("adaptive", "least"), ("marginal", "most")):
        moving = replace(recipe, prefix=PrefixConfig(policy, 9, 75))
        told = assumptions(make_plan(laid_out(moving, (1, 1), (1, 1))))
        assert told.endswith(f"counted is its start, the {bound} it can cost.")


def test_prompt_lengths_come_from_the_data_where_it_is_here(recipe: Recipe) -> None:
    run = laid_out(recipe, (1, 1), (1, 1))
    assert set(look_at_prompts(run).lengths) == {10, 20, 30}
    elsewhere = replace(run, recipe=replace(recipe, data=replace(recipe.data, path="some/hub-id")))
    assert look_at_prompts(elsewhere) == Seen()
    cost = make_plan(elsewhere).cost
    assert cost.prompt_tokens == 64
    assert "upper bound" in cost.prompt_tokens_from


def test_json_is_exact_and_tables_name_every_rank(recipe: Recipe) -> None:
    plan = make_plan(laid_out(recipe, (2, 1), (1, 2)))
    told = json.loads(plan_json(plan))
    assert told["cost"]["run"]["flops"]["total"] == plan.cost.run.flops.total
    assert told["cost"]["run"]["ratio"] == plan.cost.run.ratio
    assert [rank["total"] for rank in told["ranks"]] == [rank.total for rank in plan.ranks]
    assert told["teacher"]["groups"]["pp"] == [[0, 1]]
    assert told["recipe"]["prefix"]["policy"] == "anchored"
    text = shown(plan)
    assert "[0,1]" in text and "265" in text and "272" in text
    assert f"{plan.cost.run.ratio:.3f}" in text
    assert "expert" not in text
    spread = replace(plan.teacher, expert_model_parallel_size=4, expert_tensor_parallel_size=2)
    text = shown(replace(plan, teacher=spread))
    assert "expert x expert-tensor" in text and "4 x 2" in text


def test_ranks_of_the_same_stages_share_a_column(recipe: Recipe) -> None:
    big = replace(recipe, train=replace(recipe.train, global_batch_size=96))
    plan = make_plan(laid_out(big, (1, 2), (1, 1), world=24))
    assert [[rank.rank for rank in kind] for kind in rank_kinds(plan.ranks)] == [
        list(range(12)),
        list(range(12, 24)),
    ]
    assert "0-11" in shown(plan) and "12-23" in shown(plan)
    assert len(json.loads(plan_json(plan))["ranks"]) == 24


def test_a_separate_teacher_is_a_kind_of_rank_of_its_own(recipe: Recipe) -> None:
    teacher = replace(recipe.teacher, placement="separate", pipeline_model_parallel_size=2)
    student = replace(recipe.student, tensor_model_parallel_size=2)
    ranks = make_plan(validate(replace(recipe, student=student, teacher=teacher))).ranks
    together = make_plan(laid_out(recipe, (2, 1), (1, 2))).ranks
    assert len(ranks) == 4
    assert [rank.student_at for rank in ranks] == [(0, 0, 0), (1, 0, 0), (), ()]
    places = [[part.at for part in rank.teachers] for rank in ranks]
    assert places == [[], [], [(0, 0, 0)], [(0, 0, 1)]]
    for alone, shared in zip(ranks[:2], together, strict=True):
        assert alone.student_weights == shared.student_weights
        assert alone.teacher_head == shared.teacher_head
        assert alone.teacher_weights == 0 and not alone.teachers
    for alone, shared in zip(ranks[2:], together, strict=True):
        assert alone.teacher_weights == shared.teacher_weights
        assert alone.student_parameters == alone.activations == alone.kl_workspace == 0
    # Two on their way and one in use, of four sequences each, in place of a step's eight.
    assert ranks[0].teacher_hidden == 3 * 4 * 75 * 64 * 2 < together[0].teacher_hidden
    assert (ranks[2].teacher_hidden, ranks[3].teacher_hidden) == (0, ranks[0].teacher_hidden)


def test_fp8_keeps_copies_of_weights(recipe: Recipe) -> None:
    plain = make_plan(laid_out(recipe, (1, 1), (1, 1))).ranks[0]
    fp8 = Fp8Config(format="hybrid", recipe="tensorwise")
    narrow = replace(recipe, teacher=replace(recipe.teacher, fp8=fp8))
    rank = make_plan(laid_out(narrow, (1, 1), (1, 1))).ranks[0]
    assert rank.fp8_weights == rank.teacher_weights // 2 and plain.fp8_weights == 0
    assert rank.total == plain.total + rank.fp8_weights


def test_what_fp8_saves_of_activations_is_shown(recipe: Recipe) -> None:
    fp8 = Fp8Config("hybrid", "tensorwise", first_last_layers_bf16=False)
    student = replace(recipe.student, params_dtype="bf16", fp8=fp8)
    plan = make_plan(laid_out(replace(recipe, student=student), (1, 1), (1, 1)))
    # Of both layers: hidden 64 into qkv and fc1, 64 heads' width into proj, 96 into fc2.
    saved = 2 * (2 * 64 + 64 + 96)
    assert json.loads(plan_json(plan))["student"]["fp8_bytes_saved"] == saved
    assert "activations saved by FP8" in shown(plan)
    assert f"{saved} bytes a token and rank" in shown(plan)
    plain = make_plan(laid_out(recipe, (1, 1), (1, 1)))
    assert json.loads(plan_json(plain))["student"]["fp8_bytes_saved"] == 0
    assert "saved by FP8" not in shown(plain)


@pytest.mark.parametrize(("positions", "chunk_size"), [(1, 0), (300, 0), (1000, 0), (1000, 64)])
def test_the_workspace_is_what_the_loss_takes(positions: int, chunk_size: int) -> None:
    rows, width = 40000, 4  # so many that the loss cuts 300 positions into chunks
    workspace = Workspace(huge_pages=False)
    head, hidden = torch.ones(rows, width), torch.ones(positions, width)
    weight = torch.full((positions,), 1 / positions)
    models = (hidden, head, hidden, head)
    chunk = chunk_size or None
    prefix_divergence(*models, weight, vocab_size=rows, chunk_size=chunk, workspace=workspace)
    taken = sum(buffer.nbytes for buffer in workspace._flat)
    planned = kl_workspace(rows, positions, ranks=1, fused=False, chunk_size=chunk_size)
    assert planned == taken
