"""FLOPs formulas against torch's counter on models of transformers, and the ledger's sums."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from megatron_prefix.prefix import Ledger, ModelShape, StepCost, model_shape, rollout_flops
from megatron_prefix.prefix.flops import head_flops, step_flops, trunk_flops
from megatron_prefix.types import FinishReason, Flops, Rollout
from tests.tiny_models import (
    write_tiny_deepseek_v2,
    write_tiny_deepseek_v3,
    write_tiny_gpt_oss,
    write_tiny_llama,
    write_tiny_mixtral,
    write_tiny_qwen2,
    write_tiny_qwen3,
    write_tiny_qwen3_moe,
)

PROMPT, PREFIX = 23, 41
WRITERS = [
    write_tiny_qwen3,
    write_tiny_llama,
    write_tiny_qwen2,
    write_tiny_qwen3_moe,
    write_tiny_mixtral,
]
# transformers' cache holds the latents and expands all of them anew for every token.
WITHOUT_CACHE = [*WRITERS, write_tiny_deepseek_v2, write_tiny_deepseek_v3, write_tiny_gpt_oss]
SIZES: dict[str, Any] = {"vocab_size": 320, "head_dim": 24, "intermediate_size": 112}


def load(folder: Path) -> tuple[Any, ModelShape]:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",  # a loop of products, each of which is counted
        dtype=torch.float32,
    )
    return model, model_shape(json.loads((folder / "config.json").read_text()))


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def tokens(count: int) -> torch.Tensor:
    return torch.arange(count)[None] % 300


def not_causal(shape: ModelShape, count: int) -> float:
    """What torch's eager attention multiplies beyond the causal half, or beyond a window's share
    of it: it masks afterwards."""
    attention = trunk_flops(shape, count) - 2.0 * shape.trunk_weights * count
    return 2.0 * shape.layers * shape.heads * shape.pair_width * count * count - attention


@pytest.mark.parametrize("write", WRITERS)
def test_rollout_equals_prefill_and_decode_with_a_cache(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    model, shape = load(write(tmp_path, **SIZES))
    ids = tokens(PROMPT + PREFIX)

    @torch.no_grad()
    def sample() -> None:
        cache = DynamicCache(config=model.config)
        model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
        for at in range(PROMPT, PROMPT + PREFIX - 1):
            model(ids[:, at : at + 1], past_key_values=cache, logits_to_keep=1)

    measured = counted(sample) - not_causal(shape, PROMPT)
    assert rollout_flops(shape, shape, PROMPT, PREFIX).rollout == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("write", WITHOUT_CACHE)
def test_teacher_equals_one_forward_with_logits_at_the_prefix(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    model, shape = load(write(tmp_path, **SIZES))
    fed = PROMPT + PREFIX - 1

    @torch.no_grad()
    def score() -> None:
        model(tokens(fed), use_cache=False, logits_to_keep=PREFIX)

    measured = counted(score) - not_causal(shape, fed)
    assert rollout_flops(shape, shape, PROMPT, PREFIX).teacher == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("write", WITHOUT_CACHE)
def test_student_equals_forward_and_backward(write: Callable[..., Path], tmp_path: Path) -> None:
    model, shape = load(write(tmp_path, **SIZES))
    fed = PROMPT + PREFIX - 1

    def learn() -> None:
        model(tokens(fed), use_cache=False, logits_to_keep=PREFIX).logits.square().mean().backward()

    measured = counted(learn) - 3 * not_causal(shape, fed)
    assert rollout_flops(shape, shape, PROMPT, PREFIX).student == pytest.approx(measured, rel=0.02)


def test_head_and_attention_are_counted_exactly() -> None:
    shape = ModelShape(2, 8, heads=2, kv_heads=1, head_dim=6, ffn_columns=2 * 10, vocab=50)
    assert head_flops(shape, 3) == 2 * 3 * 8 * 50
    weights = 2 * (8 * 12 + 8 * 6 * 2 + 12 * 8) + 3 * 8 * 20
    # One token attends to itself: a product of 6 for each score and each value, 2 heads, 2 layers.
    assert trunk_flops(shape, 1) == 2 * weights + 2 * 2 * 6 * 2 * 2
    assert trunk_flops(shape, 3) - 3 * 2 * weights == (1 + 2 + 3) * 2 * 2 * 6 * 2 * 2


def test_a_window_of_keys_is_counted_exactly() -> None:
    shape = ModelShape(3, 8, heads=2, kv_heads=1, head_dim=6, ffn_columns=0, vocab=50)
    windowed = replace(shape, windowed_layers=2, window=3)
    spared = trunk_flops(shape, 5) - trunk_flops(windowed, 5)
    # The fourth and the fifth token meet one and two keys fewer.
    assert spared == 2 * (1 + 2) * 2 * 2 * 6 * 2
    assert trunk_flops(windowed, 3) == trunk_flops(shape, 3)


def test_mixture_of_experts_counts_active_experts_and_the_router() -> None:
    config = {
        "num_hidden_layers": 4,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 100,
        "vocab_size": 64,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    }
    shape = model_shape(config)
    assert shape.ffn_columns == 100 + 3 * 2 * 12
    assert shape.router_columns == 3 * 6


def test_llama_without_head_dim_or_groups_takes_the_defaults() -> None:
    shape = model_shape(
        {
            "num_hidden_layers": 1,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "intermediate_size": 8,
            "vocab_size": 10,
        }
    )
    assert (shape.head_dim, shape.kv_heads, shape.ffn_columns) == (16, 4, 8)


STUDENT = ModelShape(2, 64, 4, 4, 16, 2 * 192, 46)
TEACHER = ModelShape(3, 96, 4, 4, 24, 3 * 256, 46)


def rollout(prompt: int, prefix: int, reason: FinishReason) -> Rollout:
    return Rollout((1,) * prompt, (2,) * prefix, (0.0,) * prefix, reason, 0, 0)


def test_step_is_the_sum_of_its_rollouts() -> None:
    pairs = [(3, 5), (7, 1), (4, 0)]
    total = step_flops(STUDENT, TEACHER, pairs)
    parts = [rollout_flops(STUDENT, TEACHER, *pair) for pair in pairs]
    assert total.student == sum(part.student for part in parts)
    assert total.total == sum(part.total for part in parts)
    assert parts[2] == Flops(rollout=trunk_flops(STUDENT, 4))
    assert step_flops(STUDENT, TEACHER, []) == Flops()


def test_a_window_spares_heads_alone_until_there_is_nothing_to_score() -> None:
    whole, window = (rollout_flops(STUDENT, TEACHER, 14, 20, start) for start in (0, 15))
    assert window.rollout == whole.rollout
    assert whole.teacher - window.teacher == pytest.approx(head_flops(TEACHER, 15))
    assert whole.student - window.student == pytest.approx(3 * head_flops(STUDENT, 15))
    assert rollout_flops(STUDENT, TEACHER, 14, 20, 20) == Flops(rollout=whole.rollout)


def test_a_windows_counterfactual_scores_everything() -> None:
    ledger = Ledger(STUDENT, TEACHER, max_length=75)
    full = [rollout(14, 75, "length")]
    assert ledger.measure(full, 66).flops_full == ledger.measure(full).flops
    assert ledger.measure(full, 66).flops.total < ledger.measure(full).flops.total


def test_ledger_continues_what_the_prefix_cut_and_leaves_what_ended_by_itself() -> None:
    ledger = Ledger(STUDENT, TEACHER, max_length=75)
    cost = ledger.measure(
        [rollout(14, 9, "length"), rollout(14, 4, "stop"), rollout(14, 2, "abort")]
        + [rollout(14, 6, "cut")]
    )
    assert (cost.prompt_tokens, cost.prefix_tokens, cost.full_tokens) == (56, 21, 75 * 3 + 4)
    assert cost.flops == step_flops(STUDENT, TEACHER, [(14, 9), (14, 4), (14, 2), (14, 6)])
    assert cost.flops_full == step_flops(STUDENT, TEACHER, [(14, 75), (14, 4), (14, 75), (14, 75)])
    assert cost.ratio == cost.flops.total / cost.flops_full.total < 1
    assert ledger.total == StepCost()


def test_written_prefixes_cost_no_sampling_and_supervised_steps_no_teacher() -> None:
    ledger = Ledger(STUDENT, TEACHER, max_length=75)
    sampled = rollout(14, 9, "length")
    written = replace(sampled, written=True)
    whole = ledger.measure([sampled]).flops
    assert ledger.measure([written]).flops == replace(whole, rollout=0.0)
    supervised = ledger.measure([written], supervised=True)
    assert supervised.flops == replace(whole, rollout=0.0, teacher=0.0)
    assert supervised.flops_full == ledger.measure([sampled]).flops_full
    mixed = ledger.measure([sampled, written]).flops
    assert mixed.rollout == whole.rollout and mixed.teacher == 2 * whole.teacher


def test_rollouts_that_are_measured_together_cost_what_each_costs_by_itself() -> None:
    ledger = Ledger(STUDENT, TEACHER, max_length=75)
    plain = rollout(14, 6, "length")
    others = [rollout(15, 6, "length"), rollout(14, 7, "length"), rollout(14, 6, "stop")]
    others += [replace(plain, written=True), replace(plain, discarded=3)]
    others += [replace(plain, teacher_prompt_ids=(1, 2, 3))]
    every = [plain, *others, plain]
    single = [ledger.measure([each]) for each in every]
    assert all(cost != single[0] for cost in single[1:-1])
    assert ledger.measure(every) == sum(single, StepCost())


def test_a_rollout_that_ended_before_the_window_cost_its_sampling_alone() -> None:
    ledger = Ledger(STUDENT, TEACHER, max_length=75)
    ended = [rollout(14, 6, "stop")]
    outside = ledger.measure(ended, 6, more_passes=([""], 1))
    whole = ledger.measure(ended)
    assert outside.flops == Flops(rollout=whole.flops.rollout)
    assert outside.flops_full == whole.flops_full
    assert ledger.measure(ended, 5).flops.teacher > 0


def test_tokens_past_a_cut_were_sampled_and_nothing_else() -> None:
    ledger = Ledger(STUDENT, TEACHER, max_length=75)
    cut = rollout(14, 6, "cut")
    kept, whole = ledger.measure([cut]), ledger.measure([replace(cut, discarded=4)])
    assert whole.flops == replace(
        kept.flops, rollout=ledger.measure([rollout(14, 10, "cut")]).flops.rollout
    )
    assert whole.flops.rollout > kept.flops.rollout
    assert (whole.prefix_tokens, whole.flops_full) == (6, kept.flops_full)


def test_rollouts_that_were_thrown_away_cost_their_sampling() -> None:
    ledger = Ledger(STUDENT, TEACHER, max_length=75)
    kept = [rollout(14, 9, "stop")]
    alone, whole = ledger.measure(kept), ledger.measure(kept, discarded=[(14, 5), (3, 70)])
    straggler = rollout_flops(STUDENT, TEACHER, 3, 70).rollout
    spent = rollout_flops(STUDENT, TEACHER, 14, 5).rollout + straggler
    assert whole.flops.rollout == pytest.approx(alone.flops.rollout + spent, rel=1e-12)
    assert replace(whole.flops, rollout=0.0) == replace(alone.flops, rollout=0.0)
    assert (whole.flops_full, whole.prefix_tokens) == (alone.flops_full, 9)


def test_a_forward_pass_before_the_step_is_a_third_of_the_students_part() -> None:
    rollouts = [rollout(14, 9, "length")]
    ledger = Ledger(STUDENT, TEACHER, 75)
    before, after = (ledger.measure(rollouts, more_passes=((), n)) for n in (0, 1))
    assert after.flops.student == pytest.approx(before.flops.student * 4 / 3, rel=1e-12)
    assert after.flops.teacher == before.flops.teacher and after.flops_full == before.flops_full
    supervised = ledger.measure(rollouts, supervised=True).flops
    assert supervised.student == before.flops.student
    again = ledger.measure(rollouts, more_passes=([""], 0)).flops
    assert again.teacher == pytest.approx(before.flops.teacher + head_flops(TEACHER, 9))
    assert again.student == before.flops.student
    other = ledger.measure(rollouts, more_passes=(["math"], 0)).flops
    assert other == before.flops


def test_a_teachers_own_prompt_costs_the_teacher_alone() -> None:
    ledger = Ledger(STUDENT, TEACHER, max_length=75)
    plain = rollout(14, 9, "length")
    longer = replace(plain, teacher_prompt_ids=(1,) * 40)
    ours, theirs = ledger.measure([plain]).flops, ledger.measure([longer]).flops
    assert (theirs.rollout, theirs.student) == (ours.rollout, ours.student)
    assert theirs.teacher == rollout_flops(STUDENT, TEACHER, 40, 9).teacher > ours.teacher
    probe = ledger.measure_probe([longer])
    assert (probe.teacher, probe.student) == (theirs.teacher, theirs.student / 3)


def test_ledger_at_full_length_is_its_own_counterfactual() -> None:
    cost = Ledger(STUDENT, TEACHER, max_length=75).measure(
        [rollout(14, 75, "length"), rollout(3, 75, "stop")]
    )
    assert cost.flops == cost.flops_full
    assert cost.ratio == 1.0


def test_ledger_adds_steps_and_resumes_exactly() -> None:
    steps = [[rollout(14, n, "length")] * 3 for n in (9, 75, 30)]
    whole = Ledger(STUDENT, TEACHER, max_length=75)
    for step in steps:
        whole.add(whole.measure(step))
    half = Ledger(STUDENT, TEACHER, max_length=75)
    half.add(half.measure(steps[0]))
    resumed = Ledger(STUDENT, TEACHER, max_length=75)
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    for step in steps[1:]:
        resumed.add(resumed.measure(step))
    assert resumed.total == whole.total
    assert whole.total.prefix_tokens == 3 * (9 + 75 + 30)
    assert isinstance(resumed.total.prefix_tokens, int)


def test_an_empty_ledger_has_spent_all_of_nothing() -> None:
    assert Ledger(STUDENT, TEACHER, max_length=75).total.ratio == 1.0
