"""A plan of several teachers, of an offloaded one, and of each mode against a run's own ledger."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_prefix.config import (
    DataConfig,
    EvalConfig,
    LogConfig,
    LossConfig,
    ModeConfig,
    ModelConfig,
    PrefixConfig,
    Recipe,
    RunConfig,
    TokenWeightConfig,
    TrainConfig,
)
from megatron_prefix.config.modes import TeacherPromptConfig
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.modes import (
    evaluation_due,
    is_supervised,
    probe_due,
    served_teachers,
    written_count,
)
from megatron_prefix.plan import Plan, Seen, look_at_prompts, make_plan
from megatron_prefix.plan.view import plan_json, print_plan
from megatron_prefix.prefix import Ledger, StepCost, build_policy, loss_start, model_shape
from megatron_prefix.types import Rollout
from megatron_prefix.validate import ValidRun, validate
from tests.tiny_models import write_tiny_llama, write_tiny_qwen3, write_tiny_qwen3_moe

STEPS, BATCH, PROMPT = 10, 8, 20


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_qwen3(folder / "student", vocab_size=265)
    write_tiny_llama(folder / "teacher", vocab_size=272, num_hidden_layers=3)
    write_tiny_qwen3_moe(folder / "math", vocab_size=265, hidden_size=128)
    for name in ("student", "teacher", "math"):
        write_byte_tokenizer(folder / name)
    domains = ("math", "teacher", "math", "math")
    row = {"prompt": "x" * PROMPT, "answer": "y" * 30}
    rows = [json.dumps({**row, "domain": domain}) for domain in domains]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    return Recipe(
        run=RunConfig(output_dir=str(folder / "runs")),
        student=ModelConfig(hf_path=str(folder / "student"), params_dtype="fp32"),
        teacher=ModelConfig(hf_path=str(folder / "teacher"), params_dtype="bf16"),
        data=DataConfig(
            path=str(folder / "prompts.jsonl"), max_prompt_length=64, chat_template="never"
        ),
        prefix=PrefixConfig("anchored", 9, 75),
        train=TrainConfig(steps=STEPS, global_batch_size=BATCH, micro_batch_size=2),
    )


def with_math(recipe: Recipe, **settings: object) -> Recipe:
    path = str(Path(recipe.student.hf_path).parent / "math")
    math = ModelConfig(hf_path=path, params_dtype="bf16", **settings)
    data = replace(recipe.data, domain_column="domain")
    return replace(recipe, data=data, teachers={"math": math})


def planned(recipe: Recipe) -> Plan:
    run = validate(recipe)
    return make_plan(run, look_at_prompts(run))


def shown(plan: Plan) -> str:
    text = io.StringIO()
    print_plan(plan, Console(file=text, width=140))
    return text.getvalue()


def test_an_offloaded_teacher_takes_the_larger_of_two_in_place_of_their_sum(recipe: Recipe) -> None:
    there = planned(recipe)
    away = planned(replace(recipe, teacher=replace(recipe.teacher, offload=True)))
    before, after = there.ranks[0], away.ranks[0]
    trunk = before.teacher_weights
    scoring = before.teachers[0].activations + trunk
    learning = before.activations + before.kl_workspace
    assert after.held == before.held - trunk
    assert after.working == before.teacher_hidden + max(learning, scoring)
    assert after.in_host_memory == trunk and before.in_host_memory == 0
    assert after.saved_by_offload == before.total - after.total > 0
    assert before.saved_by_offload == 0
    told = json.loads(plan_json(away))["ranks"][0]
    assert told["saved_by_offload"] == after.saved_by_offload
    assert "Offloaded teachers: " in shown(away) and "Offloaded" not in shown(there)


def test_several_teachers_add_up_but_for_their_hidden_states(recipe: Recipe) -> None:
    one, both = planned(recipe).ranks[0], planned(with_math(recipe)).ranks[0]
    alone = planned(replace(recipe, teacher=with_math(recipe).teachers["math"])).ranks[0]
    assert both.teacher_weights == one.teacher_weights + alone.teacher_weights
    assert both.teacher_head == one.teacher_head + alone.teacher_head
    # A step may be of one domain alone: the widest teacher's.
    assert both.teacher_hidden == alone.teacher_hidden == 2 * one.teacher_hidden
    assert [part.section for part in both.teachers] == ["teacher", "teachers.math"]


def test_one_of_several_offloaded_teachers_is_on_the_device_at_a_time(recipe: Recipe) -> None:
    several = with_math(recipe, offload=True)
    first, second = planned(several).ranks[0].teachers
    assert (first.offload, second.offload) == (False, True)
    several = replace(several, teacher=replace(several.teacher, offload=True))
    rank = planned(several).ranks[0]
    assert rank.resident == 0 and rank.in_host_memory == first.weights + second.weights
    heaviest = max(part.weights + part.activations for part in (first, second))
    learning = rank.activations + rank.kl_workspace
    assert rank.working == rank.teacher_hidden + max(heaviest, learning)


def test_a_separate_one_of_several_is_on_its_own_rank(recipe: Recipe) -> None:
    plan = planned(with_math(recipe, placement="separate"))
    beside, apart = plan.ranks
    assert [part.domain for part in beside.teachers] == [""]
    assert [part.domain for part in apart.teachers] == ["math"]
    assert apart.student_parameters == apart.teacher_head == 0 < apart.teacher_weights
    # Two on their way and one in use, of two sequences each; the other's are there all step.
    assert apart.teacher_hidden == 3 * 2 * 75 * 128 * 2
    assert beside.teacher_hidden == apart.teacher_hidden + BATCH * 75 * 64 * 2
    assert "teachers.math" in shown(plan) and "math 75%" in shown(plan)


def test_supervised_runs_hold_no_teacher(recipe: Recipe) -> None:
    plan = planned(replace(recipe, mode=ModeConfig(name="sft")))
    (rank,) = plan.ranks
    assert not rank.teachers and rank.teacher_head == rank.teacher_hidden == 0
    assert rank.kl_workspace > 0 and plan.cost.run.flops.teacher == plan.cost.run.flops.rollout == 0
    assert f"No teacher scores {STEPS} of the {STEPS} steps" in shown(plan)


def in_the_ledger(run: ValidRun, domains: Sequence[str], teacher_prompt: int = 0) -> StepCost:
    """What a run's own ledger holds at its end, every rollout as long as its step allows."""
    recipe = run.recipe
    rule = recipe.loss.weights.rule
    looked_at = {"", *run.more_teachers} - served_teachers(recipe).keys()
    passes = looked_at if rule == "discrepancy" else [], int(rule == "entropy")
    shapes = {name: model_shape(model.hf.config) for name, model in run.more_teachers.items()}
    ledger = Ledger(*both(run), recipe.prefix.max_length, shapes)
    policy = build_policy(recipe.prefix, STEPS)
    for step in range(STEPS):
        length, written = policy.length(step), written_count(recipe, step)
        rollouts = [
            replace(
                a_rollout(length, teacher_prompt),
                domain=domains[index % len(domains)],
                written=index < written,
            )
            for index in range(BATCH)
        ]
        supervised = is_supervised(recipe, step)
        start = loss_start(policy, step)
        explores = step < recipe.loss.weights.explore * STEPS
        more = (looked_at, 0) if explores else passes
        cost = ledger.measure(rollouts, start, supervised=supervised, more_passes=more)
        ledger.add(cost)
    return ledger.total


def both(run: ValidRun):
    return model_shape(run.student.hf.config), model_shape(run.teacher.hf.config)


def a_rollout(length: int, teacher_prompt: int = 0) -> Rollout:
    prompt, ids = (1,) * PROMPT, (1,) * length
    own = (1,) * teacher_prompt
    return Rollout(prompt, ids, (0.0,) * length, "length", 0, 0, teacher_prompt_ids=own)


@pytest.mark.parametrize(
    "mode",
    [
        ModeConfig(),
        ModeConfig(name="off_policy"),
        ModeConfig(name="mixed", written_share=0.25),
        ModeConfig(name="sft"),
        ModeConfig(warmup_steps=4),
        ModeConfig(name="mixed", warmup_steps=3),
    ],
    ids=lambda mode: f"{mode.name} {mode.warmup_steps}",
)
def test_a_mode_costs_what_its_ledger_will_say(recipe: Recipe, mode: ModeConfig) -> None:
    run = validate(replace(recipe, mode=mode))
    cost, ledger = make_plan(run, look_at_prompts(run)).cost, in_the_ledger(run, [""])
    check_same(cost.run, ledger)
    assert cost.supervised_steps == sum(is_supervised(run.recipe, step) for step in range(STEPS))


def check_same(planned: StepCost, ledger: StepCost) -> None:
    for name in ("rollout", "teacher", "student"):
        for one, other in ((planned.flops, ledger.flops), (planned.flops_full, ledger.flops_full)):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-12), name
    assert planned.prefix_tokens == ledger.prefix_tokens
    assert (planned.prompt_tokens, planned.full_tokens) == (
        ledger.prompt_tokens,
        ledger.full_tokens,
    )


def test_each_domain_costs_its_own_teacher(recipe: Recipe) -> None:
    run = validate(with_math(recipe))
    seen = look_at_prompts(run)
    assert seen.shares(["", "math"]) == {"": 0.25, "math": 0.75}
    check_same(make_plan(run, seen).cost.run, in_the_ledger(run, ["math", "", "math", "math"]))
    unseen = Seen(lengths=(PROMPT,), teacher_lengths=(PROMPT,))
    check_same(make_plan(run, unseen).cost.run, in_the_ledger(run, ["math", ""]))


def test_a_look_at_tokens_costs_teachers_that_no_server_runs(recipe: Recipe) -> None:
    weights = LossConfig(weights=TokenWeightConfig(rule="discrepancy"))
    teacher = replace(recipe.teacher, placement="server")
    run = validate(with_math(replace(recipe, loss=weights, teacher=teacher)))
    seen = look_at_prompts(run)
    check_same(make_plan(run, seen).cost.run, in_the_ledger(run, ["math", "", "math", "math"]))


def test_a_look_at_the_students_entropy_costs_the_student_a_pass(recipe: Recipe) -> None:
    weights = LossConfig(weights=TokenWeightConfig(rule="entropy"))
    run = validate(replace(recipe, loss=weights))
    plan = make_plan(run, look_at_prompts(run))
    check_same(plan.cost.run, in_the_ledger(run, [""]))
    plain = planned(recipe).cost.run.flops
    assert plan.cost.run.flops.student == pytest.approx(plain.student * 4 / 3)
    assert plan.cost.run.flops.teacher == plain.teacher


def test_exploring_steps_ask_the_teacher_once_more_and_the_others_the_student(
    recipe: Recipe,
) -> None:
    weights = LossConfig(weights=TokenWeightConfig(rule="entropy", explore=0.4))
    run = validate(replace(recipe, loss=weights))
    cost, plain = make_plan(run, look_at_prompts(run)).cost.run, planned(recipe).cost.run.flops
    check_same(cost, in_the_ledger(run, [""]))
    assert plain.student < cost.flops.student < plain.student * 4 / 3
    assert plain.teacher < cost.flops.teacher


def test_a_teacher_that_reads_and_weighs_costs_more(recipe: Recipe) -> None:
    prompt = TeacherPromptConfig(template="{prompt} A correct solution: {answer}", max_length=128)
    weights = LossConfig(weights=TokenWeightConfig(rule="discrepancy"))
    changed = replace(recipe, mode=ModeConfig(teacher_prompt=prompt), loss=weights)
    run = validate(changed)
    plan = make_plan(run, look_at_prompts(run))
    length = PROMPT + len(" A correct solution: ") + 30
    check_same(plan.cost.run, in_the_ledger(run, [""], length))
    plain = planned(recipe).ranks[0].teachers[0].activations
    assert plan.ranks[0].teachers[0].activations == plain * (128 + 74) // (64 + 74)


@pytest.mark.parametrize("agreement", [True, False])
def test_probes_and_evaluations_cost_what_the_ledger_will_say(
    recipe: Recipe, agreement: bool
) -> None:
    log = LogConfig(probe_interval=3, probe_rollouts=5, probe_agreement=agreement)
    answers = EvalConfig(path=recipe.data.path, samples=3, interval=4, max_new_tokens=99)
    run = validate(replace(recipe, log=log, eval=answers))
    plan = make_plan(run, look_at_prompts(run))
    ledger, policy = Ledger(*both(run), 75), build_policy(recipe.prefix, STEPS)
    probed = sum(
        ledger.measure_probe(
            [a_rollout(75)] * 5, 2 * (agreement and policy.length(step) < 75)
        ).total
        for step in range(STEPS + 1)
        if probe_due(run.recipe, step)
    )
    times = sum(evaluation_due(run.recipe, step) for step in range(STEPS + 1))
    assert (plan.cost.probes, plan.cost.evaluations, plan.cost.answers) == (4, times, 3)
    assert plan.cost.probe_flops == pytest.approx(probed, rel=1e-12)
    evaluated = ledger.measure_answers([(PROMPT, 99)] * 3).total
    assert plan.cost.evaluation_flops == pytest.approx(times * evaluated, rel=1e-12)
    check_same(plan.cost.run, planned(recipe).cost.run)
    assert "FLOPs of 4 probes" in shown(plan) and f"of {times} evaluations" in shown(plan)


def test_probes_of_gradients_keep_a_separate_teachers_hidden_states(recipe: Recipe) -> None:
    apart = replace(recipe, teacher=replace(recipe.teacher, placement="separate"))
    probing = replace(apart, log=LogConfig(probe_interval=5))
    few, all_of_them = (planned(each).ranks[0].teacher_hidden for each in (apart, probing))
    assert few == 3 * 2 * 75 * 64 * 2 and all_of_them == BATCH * 75 * 64 * 2
