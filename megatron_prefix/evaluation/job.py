"""From the words of ``megatron-prefix eval`` to a checked job, and the job on a server of its own.

A run folder brings its recipe along: template, evaluation set and limits are the training's where
nothing else is said. Whatever can be refused is refused before a server starts.
"""

import argparse
import contextlib
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_prefix.commands.eval_arguments import KNOWN_SETS
from megatron_prefix.config import DataConfig, EvalConfig, Recipe, RolloutConfig
from megatron_prefix.evaluation import run as eval_run
from megatron_prefix.evaluation.evaluate import load_eval_set
from megatron_prefix.evaluation.scorers import load_scorer
from megatron_prefix.exit_codes import DONE, FAILED, SAVED
from megatron_prefix.recipe import RECORD_NAME, load_record
from megatron_prefix.rollout.protocol import Sampling, SglangError
from megatron_prefix.rollout.server import ServerFailed, server_pool
from megatron_prefix.validate.limits import RANGES, check_choice

_REQUEST_TIMEOUT_S = 7200.0  # of one answer, which may be long and waits for others
_EXPORTER = "tools/convert_megatron_to_hf.py"  # of a checkout
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Target:
    """A Hugging Face folder, and the recipe that trained it where there is one."""

    model: Path
    recipe: Recipe
    from_run: bool


@dataclass(frozen=True)
class EvalJob:
    """Settings that were checked alone; data set and model are still to be opened."""

    model: Path
    eval: EvalConfig
    data: DataConfig
    rollout: RolloutConfig
    dtype: str
    output: Path
    stop_token_ids: tuple[int, ...] = ()  # where answers end; empty: the model folder's

    def settings(self) -> dict[str, Any]:
        """What makes answers comparable, for ``settings.json``."""
        data = asdict(self.data)
        stops = {"stop_token_ids": list(self.stop_token_ids)} if self.stop_token_ids else {}
        return stops | {
            "model": str(self.model),
            "weights": {
                file.name: [file.stat().st_size, file.stat().st_mtime_ns]
                for file in sorted(self.model.glob("*.safetensors"))
            },
            "eval": {k: v for k, v in asdict(self.eval).items() if k != "interval"},
            "prompts": {
                key: data[key] for key in ("chat_template", "system_prompt", "max_prompt_length")
            },
            "samples_per_prompt": self.rollout.samples_per_prompt,
            "temperature": self.rollout.temperature,
            "dtype": self.dtype,
        }


def find_target(path: Path, step: int | None) -> Target:
    """The folder to serve behind a model folder or a run folder.

    ValueError where it is neither, or where the run has no export of what is asked for.
    """
    if (path / RECORD_NAME).is_file():
        recipe = load_record(path / RECORD_NAME)
        return Target(_exported(path, step, recipe), recipe, True)
    if not (path / "config.json").is_file():
        raise ValueError(
            f"{path} is neither a Hugging Face folder (config.json) nor a run's ({RECORD_NAME})"
        )
    if step is not None:
        raise ValueError(f"--step {step}: {path} is no run folder; leave --step out")
    return Target(path, Recipe(), False)


def _exported(run: Path, step: int | None, recipe: Recipe) -> Path:
    """A run exports its last step to ``hf``; those of other steps lie beside it."""
    last = recipe.train.steps
    wanted = last if step is None else step
    own = run / f"hf_step_{wanted:08d}"
    for export in (run / "hf", own) if wanted == last else (own,):
        if (export / "config.json").is_file():
            return export
    checkpoint = run / "checkpoints" / f"step_{wanted:08d}"
    if not checkpoint.is_dir():
        saved = sorted((run / "checkpoints").glob("step_*"))
        steps = ", ".join(str(int(folder.name.removeprefix("step_"))) for folder in saved)
        raise ValueError(
            f"{run} has neither an export nor a checkpoint of step {wanted}; its checkpoints are "
            f"of steps {steps or 'none'}"
        )
    raise ValueError(
        f"{run} has no export of step {wanted}; write it with {_EXPORTER} --checkpoint "
        f"{checkpoint} --output {own}, and evaluate it then"
    )


def make_job(arguments: argparse.Namespace) -> EvalJob:
    """The job behind the command's arguments; ValueError for what cannot be."""
    target = find_target(Path(arguments.model), arguments.step)
    config = json.loads((target.model / "config.json").read_text(encoding="utf-8"))
    settings = _eval_settings(arguments, target)
    data = _data_settings(arguments, target.recipe.data)
    data = replace(data, max_prompt_length=_prompt_limit(arguments, config, settings, target))
    rollout = _rollout_settings(arguments)
    name = Path(settings.path).stem or "data"
    label = "" if arguments.step is None else f"-step{arguments.step}"
    label += "" if rollout.samples_per_prompt == 1 else f"-n{rollout.samples_per_prompt}"
    folder = Path(arguments.model, "evals") if target.from_run else Path("evals", target.model.name)
    output = Path(arguments.output) if arguments.output else folder / f"{name}{label}"
    dtype = _dtype(arguments.dtype, config)
    stops = tuple(sorted(set(target.recipe.stop_tokens.ids)))
    return EvalJob(target.model.resolve(), settings, data, rollout, dtype, output, stops)


def _eval_settings(arguments: argparse.Namespace, target: Target) -> EvalConfig:
    known = target.recipe.eval if target.from_run else EvalConfig(samples=0)
    named: dict[str, Any] = {"name": "", **_known_set(arguments.data)} if arguments.data else {}
    given = {
        "path": named.get("path", arguments.data),
        "name": arguments.data_name,
        "split": arguments.split,
        "prompt_column": arguments.prompt_column,
        "answer_column": arguments.answer_column,
        "scorer": arguments.scorer,
        "max_new_tokens": arguments.max_new_tokens,
        "samples": arguments.samples,
    }
    settings = replace(known, **{**named, **{k: v for k, v in given.items() if v is not None}})
    if not settings.path:
        sets = ", ".join(KNOWN_SETS)
        raise ValueError(f"--data is not set; give a .jsonl or .json file, a hub id, or {sets}")
    _check_range("--max-new-tokens", settings.max_new_tokens, "eval.max_new_tokens")
    _check_range("--samples", settings.samples, "eval.samples")
    return settings


def _known_set(data: str | None) -> dict[str, str]:
    """What a short name stands for; nothing where a file or folder of that name is here."""
    if data not in KNOWN_SETS or Path(data).exists():
        return {}
    return {"scorer": "math", "answer_column": "answer", **KNOWN_SETS[data]}


def _data_settings(arguments: argparse.Namespace, known: DataConfig) -> DataConfig:
    given = {"chat_template": arguments.chat_template, "system_prompt": arguments.system_prompt}
    return replace(known, **{key: v for key, v in given.items() if v is not None})


def _prompt_limit(
    arguments: argparse.Namespace, config: dict[str, Any], settings: EvalConfig, target: Target
) -> int:
    """``--max-prompt-length``, the recipe's, or what the context leaves beside the answer."""
    context = int(config.get("max_position_embeddings", sys.maxsize))
    room = context - settings.max_new_tokens
    if room < 1:
        raise ValueError(
            f"--max-new-tokens {settings.max_new_tokens} leaves no room for a prompt within "
            f"max_position_embeddings={context} of {target.model}; try {context // 2}"
        )
    known = target.recipe.data.max_prompt_length if target.from_run else room
    limit = known if arguments.max_prompt_length is None else arguments.max_prompt_length
    _check_range("--max-prompt-length", limit, "data.max_prompt_length")
    if limit > room:
        raise ValueError(
            f"--max-prompt-length {limit} + --max-new-tokens {settings.max_new_tokens} is above "
            f"max_position_embeddings={context} of {target.model}; shorten one"
        )
    return limit


def _rollout_settings(arguments: argparse.Namespace) -> RolloutConfig:
    n, temperature = arguments.n, arguments.temperature
    _check_range("--n", n, "rollout.samples_per_prompt")
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"--temperature {temperature} must be 0 (greedy) or above")
    if n > 1 and temperature == 0.0:
        raise ValueError(f"--n {n} greedy answers are one answer; add --temperature 0.7")
    _check_range("--servers", arguments.servers, "rollout.num_servers")
    check_choice("--device", arguments.device, ("auto", "cuda", "cpu"))
    return RolloutConfig(
        num_servers=arguments.servers,
        server_tensor_parallel_size=arguments.tensor_parallel_size,
        device=arguments.device,
        samples_per_prompt=n,
        temperature=temperature,
        request_timeout_s=_REQUEST_TIMEOUT_S,
    )


def _check_range(name: str, value: float, key: str) -> None:
    if not RANGES[key].holds(value):
        raise ValueError(f"{name} {value} must be {RANGES[key]}")


def _dtype(asked: str, config: dict[str, Any]) -> str:
    """``auto``: the checkpoint's own."""
    check_choice("--dtype", asked, ("auto", *_DTYPES.values()))
    if asked != "auto":
        return asked
    own = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return _DTYPES.get(own.removeprefix("torch."), "bf16")


def run_eval(job: EvalJob, console: Console, as_json: bool) -> int:
    """Runs the job to its summary; the exit code. ``console`` gets the progress."""
    from megatron_prefix.data.tokenizers import load_tokenizer, stop_token_ids

    started = time.monotonic()
    tokenizer, settings = load_tokenizer(str(job.model)), job.settings()
    problems = load_eval_set(job.eval, tokenizer, job.data)
    n = job.rollout.samples_per_prompt
    stops = job.stop_token_ids or stop_token_ids(str(job.model))
    questions = eval_run.Questions(
        problems,
        n,
        Sampling(job.eval.max_new_tokens, job.rollout.temperature, stops),
        tokenizer,
        load_scorer(job.eval.scorer),
    )
    eval_run.check_settings_file(job.output, settings)
    try:
        samples = _answers(job, questions, console)
    except KeyboardInterrupt:
        print(
            f"stopped; answers are kept in {job.output}: run the same command again to resume",
            file=sys.stderr,
        )
        return SAVED
    except (SglangError, ServerFailed) as error:
        print(f"megatron-prefix: error: {error}", file=sys.stderr)
        return FAILED
    summary = eval_run.summarise(problems, n, samples)
    record = eval_run.summary_record(summary, settings)
    record = eval_run.write_summary(job.output, record, started)
    if as_json:
        print(json.dumps(record, allow_nan=False))
    else:
        _print_table(job, summary)
    return DONE


def _answers(
    job: EvalJob, questions: eval_run.Questions, console: Console
) -> list[eval_run.EvalSample]:
    """Where every answer is kept already, no server is started."""
    wanted = len(questions.problems.prompts) * questions.samples_per_prompt
    kept = len(eval_run.kept_samples(job.output))
    with contextlib.ExitStack() as stack:
        endpoints = []
        if kept < wanted:
            console.print(f"{kept} of {wanted} answers are there; starting SGLang")
            servers = stack.enter_context(
                server_pool(
                    job.model,
                    job.rollout,
                    params_dtype=job.dtype,
                    log_folder=job.output / "logs",
                )
            )
            endpoints = [server.endpoint for server in servers]
        return eval_run.ask(questions, endpoints, job.output, console)


def _print_table(job: EvalJob, summary: eval_run.EvalSummary) -> None:
    table = Table(title=f"{job.model} on {job.eval.path}", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in eval_run.summary_lines(summary):
        table.add_row(name, value)
    console = Console()
    console.print(table)
    console.print(f"answers: {job.output / eval_run.SAMPLES}", soft_wrap=True)
