"""What ``megatron-prefix eval`` makes of its words, what it refuses, and what it keeps."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_prefix.cli import build_parser, main
from megatron_prefix.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    Recipe,
    StopTokensConfig,
    TrainConfig,
)
from megatron_prefix.evaluation import run as eval_run
from megatron_prefix.evaluation.evaluate import EvalSample, EvalSet
from megatron_prefix.evaluation.job import EvalJob, make_job
from megatron_prefix.recipe import load_record, save_record
from megatron_prefix.tasks import sort_chain
from megatron_prefix.types import FinishReason, Prompt
from tests.tiny_models import write_tiny_qwen3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context of 512 tokens."""
    return write_tiny_qwen3(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A run of 20 steps with a checkpoint of its step 10 and no export."""
    folder = tmp_path / "runs" / "short"
    recipe = Recipe(
        student=ModelConfig(hf_path=str(model)),
        data=DataConfig(path="train.jsonl", max_prompt_length=40, system_prompt="Be short."),
        eval=EvalConfig(path="held_out.jsonl", scorer="suffix", max_new_tokens=75, samples=50),
        train=TrainConfig(steps=20),
    )
    save_record(recipe, folder)
    (folder / "checkpoints" / "step_00000010").mkdir(parents=True)
    return folder


def export(run: Path, model: Path, name: str = "hf") -> None:
    (run / name).mkdir()
    for file in ("config.json", "model.safetensors"):
        (run / name / file).write_bytes((model / file).read_bytes())


def job(*words: str | Path) -> EvalJob:
    return make_job(build_parser().parse_args(["eval", *map(str, words)]))


def test_a_model_folder_is_asked_everything_greedily(model: Path) -> None:
    words = ("--data", "gsm8k/test.jsonl", "--prompt-column", "question")
    made = job(model, *words, "--max-new-tokens", "64")
    assert (made.model, made.output) == (model.resolve(), Path("evals/tiny/test"))
    assert made.eval == EvalConfig(
        "gsm8k/test.jsonl", prompt_column="question", samples=0, max_new_tokens=64
    )


def test_a_short_name_stands_for_a_set_on_the_hub(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job(model, "--data", "gsm8k", "--max-new-tokens", "64", "--samples", "9")
    assert made.eval == EvalConfig(
        "openai/gsm8k", "main", "test", "question", "answer", "math", 64, samples=9
    )
    assert made.output == Path("evals/tiny/gsm8k")
    other = job(model, "--data", "math500", "--max-new-tokens", "64", "--split", "train[:9]").eval
    assert (other.path, other.name, other.split) == ("HuggingFaceH4/MATH-500", "", "train[:9]")
    named = job(model, "--data", "me/mine", "--data-name", "hard", "--max-new-tokens", "9").eval
    assert (named.path, named.name, named.prompt_column) == ("me/mine", "hard", "prompt")
    (tmp_path / "amc").mkdir()  # what is here goes before what is far
    monkeypatch.chdir(tmp_path)
    assert job(model, "--data", "amc", "--max-new-tokens", "9").eval.path == "amc"


def test_answers_end_where_the_runs_recipe_says(run: Path, model: Path) -> None:
    export(run, model)
    folders = job(run)
    assert folders.stop_token_ids == () and "stop_token_ids" not in folders.settings()
    recipe = load_record(run / "recipe.yaml")
    save_record(replace(recipe, stop_tokens=StopTokensConfig(ids=(7, 5))), run)
    told = job(run)
    assert told.stop_token_ids == (5, 7) and told.settings()["stop_token_ids"] == [5, 7]


def test_prompts_get_the_context_that_answers_leave(model: Path) -> None:
    made = job(model, "--data", "a.jsonl", "--max-new-tokens", "500")
    assert made.data.max_prompt_length == 12
    assert (made.rollout.temperature, made.rollout.samples_per_prompt) == (0.0, 1)
    assert made.dtype == "fp32"  # the checkpoint's own
    assert job(model, "--data", "a.jsonl", "--max-new-tokens", "9", "--dtype", "bf16").dtype == (
        "bf16"
    )


def test_a_run_brings_its_template_set_and_limits_along(run: Path, model: Path) -> None:
    export(run, model)
    made = job(run)
    assert made.model == (run / "hf").resolve() and made.output == run / "evals" / "held_out"
    assert made.eval.scorer == "suffix" and made.eval.max_new_tokens == 75
    assert (made.data.max_prompt_length, made.data.system_prompt) == (40, "Be short.")
    other = job(run, "--step", "20", "--data", "b.jsonl", "--n", "4", "--temperature", "0.7")
    assert other.eval == replace(made.eval, path="b.jsonl")
    assert other.output == run / "evals" / "b-step20-n4"


def test_an_exported_step_is_found_beside_the_last(run: Path, model: Path) -> None:
    export(run, model)
    export(run, model, "hf_step_00000010")
    assert job(run, "--step", "10").model == (run / "hf_step_00000010").resolve()
    assert job(run).model == (run / "hf").resolve()
    assert job(run).output != job(run, "--step", "10").output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is neither a Hugging Face folder (config.json) nor a run's"),
        (["MODEL", "--step", "3"], "--step 3: "),
        (["MODEL"], "a hub id, or gsm8k, math500, aime24, amc"),
        (["MODEL", "--data", "a", "--n", "0"], "--n 0 must be at least 1"),
        (["MODEL", "--data", "a", "--n", "4"], "--n 4 greedy answers are one answer"),
        (["MODEL", "--data", "a", "--temperature", "-1"], "--temperature -1.0 must be 0"),
        (["MODEL", "--data", "a", "--max-new-tokens", "0"], "--max-new-tokens 0 must be"),
        (["MODEL", "--data", "a", "--samples", "-2"], "--samples -2 must be"),
        (["MODEL", "--data", "a", "--max-new-tokens", "512"], "leaves no room for a prompt"),
        (["MODEL", "--data", "a", "--max-prompt-length", "504"], "max_position_embeddings=512"),
        (["MODEL", "--data", "a", "--device", "gpu"], "--device='gpu' is not one of"),
        (["MODEL", "--data", "a", "--dtype", "fp8"], "--dtype='fp8' is not one of"),
        (["RUN"], "neither an export nor a checkpoint of step 20; its checkpoints are of steps 10"),
        (["RUN", "--step", "10"], "has no export of step 10; write it with tools/convert_"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str], message: str, model: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"MODEL": str(model), "RUN": str(run)}
    limited = [] if "--max-new-tokens" in words or "RUN" in words else ["--max-new-tokens", "9"]
    assert main(["eval", *(named.get(word, word) for word in words), *limited]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_what_is_wrong_with_a_set_is_told_in_this_commands_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answer": ""}\n')
    model = str(sort_chain.model_folder("student_a"))
    asked = ["eval", model, "--data", str(tmp_path / "a.jsonl"), "--max-new-tokens", "9"]
    answered = [*asked, "--answer-column", "prompt"]
    assert main(asked) == main([*answered, "--prompt-column", "x"]) == 2
    assert main([*asked, "--answer-column", "x"]) == 2
    assert main([*answered, "--scorer", "x"]) == 2
    empty, prompt, answer, scorer = capsys.readouterr().err.splitlines()
    assert f"--data {tmp_path / 'a.jsonl'}: row 0 has no answer in answer" in empty
    assert "--prompt-column x is not a column of" in prompt
    assert "--answer-column x is not a column of" in answer
    assert "--scorer 'x' is unknown. Choose one of exact, suffix, math" in scorer


PROBLEMS = EvalSet(
    prompts=tuple(Prompt(index=i, row=row, input_ids=(1,)) for i, row in enumerate((0, 1, 3))),
    answers=("a", "b", "c"),
    dropped=1,
)


def answer(row: int, n: int, correct: bool, reason: FinishReason = "stop") -> EvalSample:
    return EvalSample(row, "q", "é", "a", correct, reason == "stop", reason, 5, n)


SAMPLES = [
    answer(0, 0, True),
    answer(3, 1, False, "length"),
    answer(0, 1, True),
    answer(1, 0, False),
    answer(3, 0, False, "length"),
    answer(1, 1, True),
]


def test_answers_are_summed_by_problem_in_whatever_order_they_came() -> None:
    summary = eval_run.summarise(PROBLEMS, 2, SAMPLES)
    assert (summary.problems, summary.answers, summary.dropped) == (3, 6, 1)
    assert summary.avg_at_n.value == pytest.approx(3 / 6)
    assert summary.pass_at[2].value == pytest.approx(2 / 3)
    assert (summary.truncated, summary.unparsable, summary.tokens) == (2, 2, 30)
    shown = dict(eval_run.summary_lines(summary))
    assert shown["avg@2"].startswith("50.0%") and shown["pass@2"].startswith("66.7%")
    assert shown["truncated"] == "2 of 6 answers (33.3%)"
    assert shown["prompts too long to ask"] == "1"


def test_a_half_written_answer_is_asked_again_and_whole_ones_are_kept(tmp_path: Path) -> None:
    file = tmp_path / eval_run.SAMPLES
    assert eval_run.kept_samples(tmp_path) == []
    lines = [json.dumps(vars(sample)) + "\n" for sample in SAMPLES[:3]]
    file.write_text("".join(lines)[:-9])
    assert eval_run.kept_samples(tmp_path) == SAMPLES[:2]
    assert eval_run.kept_samples(tmp_path) == SAMPLES[:2]
    assert file.read_text().count("\n") == 2


def test_nobody_is_asked_where_every_answer_is_kept(tmp_path: Path) -> None:
    file = tmp_path / eval_run.SAMPLES
    file.write_text("".join(json.dumps(vars(sample)) + "\n" for sample in SAMPLES))
    questions = eval_run.Questions(PROBLEMS, 2, None, None, None)  # type: ignore[arg-type]
    kept = eval_run.ask(questions, [], tmp_path, Console(file=io.StringIO()))
    assert kept == SAMPLES


def test_answers_to_other_questions_are_not_mixed(tmp_path: Path) -> None:
    settings = {"model": "m", "eval": {"path": "a", "limit": (1, 2)}}
    eval_run.check_settings_file(tmp_path / "new", settings)
    eval_run.check_settings_file(tmp_path / "new", settings)
    with pytest.raises(ValueError, match="model is 'm' there and 'other' here; give this one"):
        eval_run.check_settings_file(tmp_path / "new", {**settings, "model": "other"})
