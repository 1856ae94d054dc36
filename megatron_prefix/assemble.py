"""Builds a trainer out of a recipe, on every rank alike; rank 0 gets a conductor besides."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from rich import get_console

from megatron_prefix.conductor import Conductor, Evaluator, Prober, Staff
from megatron_prefix.config import Recipe
from megatron_prefix.evaluate import EvalResult, evaluate, write_samples
from megatron_prefix.jsonl import EVALUATION_FOLDER
from megatron_prefix.layout import model_layout
from megatron_prefix.mcore import fp8
from megatron_prefix.mcore.checkpoint import Checkpointer
from megatron_prefix.mcore.groups import build_groups, initialize_megatron
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.mcore.model import MegatronModel, build_model
from megatron_prefix.mcore.optimizer import make_trainable
from megatron_prefix.mcore.weights import head_shard, load_hf_weights
from megatron_prefix.modes import needs_rollouts, needs_servers, needs_teacher, needs_written
from megatron_prefix.prefix import Ledger, build_cut_off, build_policy, model_shape
from megatron_prefix.prompts import PromptStream
from megatron_prefix.publisher import (
    NoPublisher,
    ServerPublisher,
    backend_for,
)
from megatron_prefix.rollout.client import Endpoint, SglangClient
from megatron_prefix.rollout.collector import Collector
from megatron_prefix.rollout.protocol import ServerUnavailable
from megatron_prefix.rollout.weights import WeightGroup
from megatron_prefix.run_log import RunLog
from megatron_prefix.sources import (
    ModeSource,
    RecordedSource,
    ReplaySource,
    RolloutSource,
    ServerSource,
    Supply,
)
from megatron_prefix.student import Objective
from megatron_prefix.teacher import ColocatedTeacher
from megatron_prefix.tokenizers import load_tokenizer, stop_token_ids
from megatron_prefix.trainer import Parts, Publisher, Trainer
from megatron_prefix.types import Prompt, Rollout, TeacherHead
from megatron_prefix.written import WrittenSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def assemble(
    recipe: Recipe,
    folder: Path,
    endpoints: Sequence[Endpoint],
    stop_requested: Callable[[], bool],
) -> Iterator[Trainer]:
    """The trainer of this rank. Collective; ``endpoints`` are rank 0's."""
    with contextlib.ExitStack() as stack:
        device = _device()
        initialize_megatron(recipe.train.seed)
        student = _model(recipe, "student")
        teacher = _model(recipe, "teacher") if needs_teacher(recipe) else None
        groups = student.groups
        trainable = make_trainable(student, recipe.optimizer, recipe.train.steps)
        yield Trainer(
            recipe,
            Parts(
                student=trainable,
                teacher=ColocatedTeacher(teacher, groups.layout, device) if teacher else None,
                objective=Objective(recipe.loss, _teacher_head(student, teacher, device)),
                publisher=_publisher(recipe, student, endpoints, folder, stack),
                checkpointer=Checkpointer(folder / "checkpoints", trainable, recipe.checkpoint),
                conductor=_conductor(recipe, folder, endpoints, stop_requested, stack),
                host_group=_host_group(),
                device=device,
                export_folder=folder / "hf",
                token_multiple=token_multiple(recipe),
            ),
        )


def _host_group() -> dist.ProcessGroup:
    """All ranks over gloo, whatever carries the tensors: orders live on the host."""
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _model(recipe: Recipe, owner: str) -> MegatronModel:
    config = getattr(recipe, owner)
    groups = build_groups(model_layout(config, dist.get_world_size()))
    hf = read_hf_model(config.hf_path)
    model = build_model(config, hf, groups, owner=owner, with_head=owner == "student")
    load_hf_weights(model)
    return model


def _teacher_head(
    student: MegatronModel, teacher: MegatronModel | None, device: torch.device
) -> TeacherHead | None:
    if teacher is None or not student.groups.is_last_stage:
        return None
    # One tokenizer may be padded to two sizes: rows past the smaller are no tokens.
    vocab = min(student.hf.shape.vocab_size, teacher.hf.shape.vocab_size)
    weight = head_shard(teacher, student.vocab_rows, student.groups.tp_rank, vocab)
    return TeacherHead(weight.to(device), vocab)


def token_multiple(recipe: Recipe) -> int:
    """Packed microbatches are padded to this many tokens: sequence parallelism cuts them in
    tensor-parallel parts, blockwise FP8 wants multiples of 128."""
    multiple = 1
    for model in (recipe.student, recipe.teacher):
        parts = model.tensor_model_parallel_size if model.sequence_parallel else 1
        width = fp8.SEQUENCE_MULTIPLE if model.fp8.format != "off" else 1
        multiple = math.lcm(multiple, parts * width)
    return multiple


def _publisher(
    recipe: Recipe,
    student: MegatronModel,
    endpoints: Sequence[Endpoint],
    folder: Path,
    stack: contextlib.ExitStack,
) -> Publisher:
    if not needs_servers(recipe):
        return NoPublisher()
    clients = [stack.enter_context(SglangClient(endpoint)) for endpoint in endpoints]
    group = None
    if clients:
        logger.info("waiting for %d SGLang server(s)", len(clients))
        _wait_for(clients, recipe.rollout.start_timeout_s)
    if clients and recipe.rollout.weight_sync == "distributed":
        group = WeightGroup.join(clients, backend=backend_for(_device()))
        stack.callback(group.close)
    return ServerPublisher(student, recipe.rollout, clients, group, folder / "sync")


def _conductor(
    recipe: Recipe,
    folder: Path,
    endpoints: Sequence[Endpoint],
    stop_requested: Callable[[], bool],
    stack: contextlib.ExitStack,
) -> Conductor | None:
    if dist.get_rank() != 0:
        return None
    tokenizer = load_tokenizer(recipe.student.hf_path)
    stops = stop_token_ids(recipe.student.hf_path)
    student, teacher = (
        model_shape(read_hf_model(m.hf_path).config) for m in (recipe.student, recipe.teacher)
    )
    conductor = Conductor(
        recipe,
        Staff(
            policy=build_policy(recipe.prefix, recipe.train.steps),
            source=_source(recipe, folder, endpoints, stops, tokenizer, stack),
            ledger=Ledger(student, teacher, recipe.prefix.max_length),
            open_log=lambda step: RunLog(
                folder, recipe.log, recipe.train.steps, console=get_console(), resume_step=step
            ),
            decode=tokenizer.decode,
            evaluate=_evaluator(recipe, folder, endpoints, stops, tokenizer, stack),
            probe=_prober(recipe, endpoints, stops, tokenizer, stack),
            stop_requested=stop_requested,
        ),
    )
    stack.callback(conductor.close)
    return conductor


def _source(
    recipe: Recipe,
    folder: Path,
    endpoints: Sequence[Endpoint],
    stops: tuple[int, ...],
    tokenizer: "PreTrainedTokenizerBase",
    stack: contextlib.ExitStack,
) -> RolloutSource:
    if recipe.rollout.replay:
        return ReplaySource(Path(recipe.rollout.replay))
    supplies: dict[str, Supply] = {}
    if needs_rollouts(recipe):
        vocab_size = read_hf_model(recipe.student.hf_path).shape.vocab_size
        cut_off = build_cut_off(recipe.prefix.cut_off, vocab_size)
        collector = stack.enter_context(Collector(endpoints, recipe.rollout, stops, cut_off))
        prompts = PromptStream(recipe.data, tokenizer)
        supplies["sampled"] = ServerSource(recipe, prompts, collector)
    if needs_written(recipe):
        supplies["written"] = WrittenSource(recipe, tokenizer, stops)
    source = ModeSource(recipe, supplies)
    return RecordedSource(source, folder / "rollouts") if recipe.rollout.record else source


def _evaluator(
    recipe: Recipe,
    folder: Path,
    endpoints: Sequence[Endpoint],
    stops: tuple[int, ...],
    tokenizer: "PreTrainedTokenizerBase",
    stack: contextlib.ExitStack,
) -> Evaluator | None:
    if not recipe.eval.path or not endpoints:
        return None
    greedy = replace(recipe.rollout, temperature=0.0, samples_per_prompt=1, over_sample=1.0)
    collector = stack.enter_context(Collector(endpoints, greedy, stops))

    def run(step: int, policy_version: int) -> EvalResult:
        def answers(prompts: Sequence[Prompt], max_new_tokens: int) -> list[Rollout]:
            collected = collector.collect(
                prompts, max_new_tokens=max_new_tokens, policy_version=policy_version
            )
            return collected.rollouts

        result = evaluate(recipe.eval, tokenizer, answers, recipe.data)
        write_samples(folder / EVALUATION_FOLDER / f"step_{step:08d}.jsonl", result.samples)
        return result

    return run


def _prober(
    recipe: Recipe,
    endpoints: Sequence[Endpoint],
    stops: tuple[int, ...],
    tokenizer: "PreTrainedTokenizerBase",
    stack: contextlib.ExitStack,
) -> Prober | None:
    """The same prompts each time, from an order of their own: the training's is not moved on."""
    if not recipe.log.probe_interval or not endpoints:
        return None
    single = replace(recipe.rollout, samples_per_prompt=1, over_sample=1.0)
    collector = stack.enter_context(Collector(endpoints, single, stops))
    data = replace(recipe.data, seed=recipe.data.seed + 1)
    prompts = PromptStream(data, tokenizer).take(recipe.log.probe_rollouts)

    def run(policy_version: int) -> list[Rollout]:
        length = recipe.prefix.max_length
        return collector.collect(
            prompts, max_new_tokens=length, policy_version=policy_version
        ).rollouts

    return run


def _wait_for(clients: Sequence[SglangClient], timeout_s: float) -> None:
    """Until every server answers; a launcher that started them watches their processes."""
    deadline = time.monotonic() + timeout_s
    for client in clients:
        while True:
            try:
                client.model_info(timeout_s=5.0, retries=0)
                break
            except ServerUnavailable as error:
                if time.monotonic() > deadline:
                    raise ServerUnavailable(
                        f"{error}; no answer within rollout.start_timeout_s={timeout_s:g}"
                    ) from error
                time.sleep(0.2)
