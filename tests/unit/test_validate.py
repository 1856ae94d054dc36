"""Everything that can be refused before a server or a rank starts, each in one line."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prefix.config import (
    DataConfig,
    EvalConfig,
    Fp8Config,
    ModelConfig,
    OptimizerConfig,
    PrefixConfig,
    Recipe,
    TrainConfig,
)
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.placement import resolve_world_size
from megatron_prefix.prefix.registry import POLICIES
from megatron_prefix.preflight import check_data_sets, check_machine, open_prompts
from megatron_prefix.recipe import load_recipe, save_record
from megatron_prefix.validate import validate
from megatron_prefix.validate.limits import CHOICES, RANGES, setting
from tests.refused import refusal_of
from tests.tiny_models import write_tiny_llama, write_tiny_mixtral, write_tiny_qwen3

TEXTS_OF_THE_USER = (
    "run.name run.output_dir student.hf_path teacher.hf_path data.path data.name data.split "
    "data.prompt_column data.domain_column data.system_prompt mode.written.path mode.written.name "
    "mode.written.split mode.written.prompt_column mode.written.answer_column "
    "mode.teacher_prompt.template mode.teacher_prompt.system_prompt "
    "prefix.policy rollout.replay rollout.api_key_file rollout.api_key checkpoint.load "
    "student.server.api_key_file teacher.server.api_key_file "
    "eval.path eval.name eval.split eval.prompt_column eval.answer_column eval.scorer"
).split()
CHECKED_ELSEWHERE = tuple(f"prefix.{name}." for name in (*POLICIES, "cut_off", "recall"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_qwen3(folder / "student", vocab_size=264)
    write_tiny_llama(folder / "teacher", vocab_size=272, num_hidden_layers=3)
    for name in ("student", "teacher"):
        write_byte_tokenizer(folder / name)
    (folder / "prompts.jsonl").write_text('{"prompt": "2+2?", "answer": "4"}\n')
    return folder


@pytest.fixture
def recipe(models: Path) -> Recipe:
    return Recipe(
        student=ModelConfig(hf_path=str(models / "student"), tensor_model_parallel_size=2),
        teacher=ModelConfig(hf_path=str(models / "teacher"), pipeline_model_parallel_size=2),
        data=DataConfig(path=str(models / "prompts.jsonl"), max_prompt_length=64),
        prefix=PrefixConfig("linear", 9, 75),
        optimizer=OptimizerConfig(lr=1e-3),
        train=TrainConfig(steps=10, global_batch_size=16, micro_batch_size=4),
    )


def changed(recipe: Recipe, folder: Path, *overrides: str) -> Recipe:
    return load_recipe(str(save_record(recipe, folder)), overrides=overrides)


def refusal(recipe: Recipe) -> str:
    return refusal_of(validate, recipe)


def test_a_sound_recipe_is_laid_out(recipe: Recipe) -> None:
    run = validate(recipe)
    assert run.world_size == 2
    assert (run.student.layout.tp, run.student.layout.dp, run.student.layout.pp) == (2, 1, 1)
    assert (run.teacher.layout.tp, run.teacher.layout.dp, run.teacher.layout.pp) == (1, 1, 2)
    assert (run.student.layers, run.teacher.layers) == ((2,), (2, 1))
    assert run.teacher.hf.shape.vocab_size == 272


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.name=", "run.name=''"),
        ("run.name=a/b", "run.name='a/b' must be the name of one folder"),
        ("run.name=..", "run.name='..'"),
        ("run.output_dir=", "run.output_dir is empty"),
        ("run.world_size=3", "run.world_size=3 must be a multiple"),
        ("run.world_size=-2", "run.world_size=-2 must be at least 0"),
        ("student.params_dtype=fp16", "student.params_dtype='fp16' is not one of bf16, fp32"),
        ("teacher.recompute_granularity=ful", "Did you mean 'full'?"),
        ("student.tensor_model_parallel_size=0", "must be at least 1"),
        ("student.tensor_model_parallel_size=4", "num_key_value_heads=2"),
        ("student.tensor_model_parallel_size=3", "num_attention_heads=4 of"),
        ("student.pipeline_model_parallel_size=5", "more than the 2 layers"),
        ("teacher.sequence_parallel=true", "teacher.sequence_parallel=true needs"),
        ("teacher.num_layers_in_first_pipeline_stage=3", "try 2"),
        ("student.num_layers_in_first_pipeline_stage=1", "set it to 0"),
        ("student.hf_path=nowhere", "student.hf_path=nowhere is no folder"),
        ("teacher.hf_path=", "teacher.hf_path is not set"),
        ("student.fp8.format=e5m2", "student.fp8.format='e5m2'"),
        ("checkpoint.load=nowhere", "checkpoint.load=nowhere is no folder"),
        ("data.path=", "data.path is not set"),
        ("data.path=no/such.jsonl", "data.path=no/such.jsonl does not exist"),
        ("data.overlong=cut", "data.overlong='cut' is not one of drop, error"),
        ("data.max_prompt_length=500", "is above max_position_embeddings=512"),
        ("eval.path=no/such.jsonl", "eval.path=no/such.jsonl does not exist"),
        ("eval.scorer=mat", "eval.scorer='mat' is unknown. Did you mean 'math'"),
        ("prefix.min_length=0", "prefix.min_length=0 must be at least 1"),
        ("prefix.min_length=80", "prefix.max_length=75 is below prefix.min_length=80"),
        ("prefix.max_length=500", "prefix.max_length=500 is above max_position_embeddings=512"),
        ("prefix.policy=liner", "Did you mean 'linear'?"),
        ("prefix.linear.over=2", "prefix.linear.over=2.0"),
        ("prefix.overlap_k=264", "prefix.overlap_k=264 compares all of the 264 tokens"),
        ("rollout.temperature=0", "rollout.temperature=0.0 must be above 0"),
        ("rollout.over_sample=0.5", "rollout.over_sample=0.5 must be at least 1"),
        ("rollout.samples_per_prompt=3", "must be a multiple of rollout.samples_per_prompt=3"),
        ("rollout.server_urls=[localhost:1]", "'localhost:1' is no URL"),
        ("rollout.server_args=[--port, 1]", "--port is set by the trainer"),
        ("rollout.server_args=[--port=1]", "--port=1 is set by the trainer"),
        ("rollout.replay=no/such", "rollout.replay=no/such is no folder"),
        ("rollout.api_key_file=no/such", "rollout.api_key_file=no/such does not exist"),
        ("rollout.weight_sync=nfs", "rollout.weight_sync='nfs'"),
        ("loss.divergence=reverse-kl", "Did you mean 'reverse_kl'?"),
        ("loss.beta=1", "loss.beta=1.0 must be above 0 and below 1"),
        ("loss.temperature=nan", "loss.temperature=nan must be above 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan"),
        ("optimizer.lr=inf", "optimizer.lr=inf"),
        ("optimizer.min_lr=0.1", "optimizer.min_lr=0.1 is above optimizer.lr=0.001"),
        ("optimizer.lr_warmup_steps=10", "must be less than train.steps=10; try 1"),
        ("optimizer.lr_decay_style=exponential", "optimizer.lr_decay_style='exponential'"),
        ("train.steps=0", "train.steps=0 must be at least 1"),
        ("train.global_batch_size=14", "must be a multiple of"),
    ],
)
def test_what_cannot_be_is_refused(
    recipe: Recipe, tmp_path: Path, override: str, message: str
) -> None:
    assert message in refusal(changed(recipe, tmp_path, override))


class LatelyTooLong:
    """A user's policy whose seventh step is out of bounds."""

    def __init__(self, config: PrefixConfig, total_steps: int) -> None:
        self._max = config.max_length

    def length(self, step: int) -> int:
        return self._max + (step == 6)

    def observe(self, observation: object) -> None:
        pass

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert_model_parallel_size": 3}, "does not divide the 4 experts of .*; try 2"),
        ({"expert_tensor_parallel_size": 5}, "does not divide an expert's width 96 of .*; try 1"),
        ({"tensor_model_parallel_size": 2}, "set student.sequence_parallel=true"),
    ],
)
def test_layouts_of_experts_that_cannot_be(
    settings: dict[str, Any], message: str, recipe: Recipe, models: Path, tmp_path: Path
) -> None:
    folder = write_tiny_mixtral(tmp_path, vocab_size=264)
    write_byte_tokenizer(folder)
    run = replace(recipe.run, world_size=30)
    train = replace(recipe.train, global_batch_size=120, micro_batch_size=1)
    student = ModelConfig(hf_path=str(folder), **settings)
    said = refusal(replace(recipe, student=student, run=run, train=train))
    assert re.search(message, said), said


def test_experts_are_spread_over_ranks_of_a_stage(
    recipe: Recipe, models: Path, tmp_path: Path
) -> None:
    folder = write_tiny_mixtral(tmp_path, vocab_size=264)
    write_byte_tokenizer(folder)
    student = ModelConfig(hf_path=str(folder), expert_model_parallel_size=4)
    run = validate(replace(recipe, student=student))
    assert run.world_size == 4
    assert [run.student.layout.expert_coordinates(r)[1] for r in range(4)] == [0, 1, 2, 3]
    dense = replace(recipe.student, expert_model_parallel_size=2)
    assert "has no experts; leave it out" in refusal(replace(recipe, student=dense))


def test_a_policy_that_will_leave_its_bounds_is_refused_now(recipe: Recipe) -> None:
    own = replace(recipe, prefix=PrefixConfig(f"{__name__}:LatelyTooLong", 9, 75))
    assert "answered 76 for step 6" in refusal(own)
    six = replace(own, train=replace(own.train, steps=6))
    assert validate(six).world_size == 2
    probed = replace(six, log=replace(six.log, probe_interval=3))  # after the last step too
    assert "answered 76 for step 6" in refusal(probed)


def leaves(settings: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def test_every_number_has_a_range_and_every_name_its_choices() -> None:
    recipe = Recipe()
    for key, value in leaves(asdict(recipe)):
        if key.startswith(CHECKED_ELSEWHERE) or ".fp8." in key or isinstance(value, bool | tuple):
            continue
        table = CHOICES if isinstance(value, str) else RANGES
        assert key in table or key in TEXTS_OF_THE_USER, key
    for key in (*CHOICES, *RANGES):
        assert setting(recipe, key) is not None


def test_batch_suggests_the_nearest_that_fit_both_models(recipe: Recipe, tmp_path: Path) -> None:
    told = refusal(changed(recipe, tmp_path, "run.world_size=4", "train.global_batch_size=30"))
    assert "train.global_batch_size=30 must be a multiple of train.micro_batch_size=4" in told
    assert "student's data parallel=2; try 24 or 32" in told
    few = ("run.world_size=4", "train.global_batch_size=4", "rollout.samples_per_prompt=4")
    assert "try 8" in refusal(changed(recipe, tmp_path, *few))


@pytest.mark.parametrize(
    ("student", "teacher", "asked", "world"),
    [
        ((2, 1), (1, 2), 0, 2),
        ((2, 1), (3, 1), 0, 6),
        ((2, 2), (1, 2), 8, 8),
        ((1, 1), (1, 1), 0, 1),
    ],
)
def test_world_is_the_least_that_both_layouts_divide(
    student: tuple[int, int], teacher: tuple[int, int], asked: int, world: int
) -> None:
    def model(sizes: tuple[int, int]) -> ModelConfig:
        tp, pp = sizes
        return ModelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)

    recipe = Recipe(student=model(student), teacher=model(teacher))
    assert resolve_world_size(replace(recipe, run=replace(recipe.run, world_size=asked))) == world


def test_a_world_that_does_not_divide_names_its_neighbours() -> None:
    recipe = Recipe(
        student=ModelConfig(tensor_model_parallel_size=2),
        teacher=ModelConfig(pipeline_model_parallel_size=3),
    )
    with pytest.raises(ValueError, match="run.world_size=8 .*try 6 or 12"):
        resolve_world_size(replace(recipe, run=replace(recipe.run, world_size=8)))


def test_evaluation_must_fit_the_students_context(
    recipe: Recipe, models: Path, tmp_path: Path
) -> None:
    with_eval = replace(
        recipe, eval=EvalConfig(path=str(models / "prompts.jsonl"), max_new_tokens=400)
    )
    validate(with_eval)
    longer = changed(with_eval, tmp_path, "eval.max_new_tokens=449")
    assert "eval.max_new_tokens=449 is above max_position_embeddings=512" in refusal(longer)


@pytest.mark.parametrize(
    ("fp8", "dtype", "message"),
    [
        (Fp8Config("e4m3", "blockwise"), "bf16", "works on blocks of 128 and hidden_size is 64"),
        (Fp8Config("hybrid", "tensorwise"), "fp32", "needs student.params_dtype=bf16, not fp32"),
        (Fp8Config("e4m3", "delayed"), "bf16", "first_last_layers_bf16"),
        (Fp8Config("e4m3", "bogus"), "bf16", "student.fp8.recipe='bogus'"),
    ],
)
def test_fp8_settings_that_cannot_be(
    recipe: Recipe, fp8: Fp8Config, dtype: str, message: str
) -> None:
    student = replace(recipe.student, fp8=fp8, params_dtype=dtype)
    assert message in refusal(replace(recipe, student=student))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU answers")
def test_a_machine_without_a_gpu_refuses_what_needs_one_and_plans_it(
    recipe: Recipe, tmp_path: Path
) -> None:
    fp8 = replace(recipe, student=replace(recipe.student, fp8=Fp8Config("hybrid", "tensorwise")))
    run = validate(fp8)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU and this machine has none"):
        check_machine(run)
    with pytest.raises(ValueError, match="rollout.device=cuda and this machine has no NVIDIA GPU"):
        check_machine(validate(changed(recipe, tmp_path, "rollout.device=cuda")))
    check_machine(validate(recipe))


def test_tokenizers_that_disagree_are_refused(recipe: Recipe, models: Path, tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(models / "teacher", other)
    vocabulary = other / "tokenizer.json"
    vocabulary.write_text(
        vocabulary.read_text().replace('"!": 33', '"!": 34').replace('"\\"": 34', '"\\"": 33')
    )
    theirs = replace(recipe, teacher=replace(recipe.teacher, hf_path=str(other)))
    swapped = replace(recipe, student=theirs.teacher, teacher=recipe.teacher)
    for told in (refusal(theirs), refusal(swapped)):
        assert "tokenizers differ first at id 33: " in told
        assert "the teacher's '" in told and "the student's '" in told
        assert told.count("is id 34") == 2  # each has the other's token at the next id


def test_vocabularies_may_be_padded_unlike(recipe: Recipe, models: Path) -> None:
    """264 rows and 272 for one tokenizer of 264 tokens, either way round."""
    one, other = str(models / "student"), str(models / "teacher")
    for student, teacher in ((one, other), (other, one)):
        models = ModelConfig(hf_path=student), ModelConfig(hf_path=teacher)
        run = validate(replace(recipe, student=models[0], teacher=models[1]))
        assert {m.hf.shape.vocab_size for m in (run.student, run.teacher)} == {264, 272}


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    recipe: Recipe, models: Path, tmp_path: Path
) -> None:
    small = write_tiny_llama(tmp_path / "small", vocab_size=200)
    write_byte_tokenizer(small)
    told = refusal(replace(recipe, teacher=replace(recipe.teacher, hf_path=str(small))))
    assert "has id 263 and the smaller vocabulary has 200 rows" in told


def test_data_sets_are_opened_before_anything_starts(
    recipe: Recipe, models: Path, tmp_path: Path
) -> None:
    check_data_sets(recipe)
    assert open_prompts(recipe).num_rows == 1
    with pytest.raises(ValueError, match="question"):
        check_data_sets(changed(recipe, tmp_path, "data.prompt_column=question"))
    with_eval = changed(recipe, tmp_path, f"eval.path={models / 'prompts.jsonl'}")
    check_data_sets(with_eval)
    with pytest.raises(ValueError, match="solution"):
        check_data_sets(changed(with_eval, tmp_path, "eval.answer_column=solution"))
