"""What a single setting may hold: names and ranges, one table each."""

import difflib
import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from megatron_prefix.config import Recipe
from megatron_prefix.modes import MODES

_DTYPES = ("bf16", "fp32")
_RECOMPUTE = ("none", "selective", "full")
_PLACEMENTS = ("colocated", "separate", "server")

CHOICES: dict[str, tuple[str, ...]] = {
    "student.params_dtype": _DTYPES,
    "teacher.params_dtype": _DTYPES,
    "student.recompute_granularity": _RECOMPUTE,
    "teacher.recompute_granularity": _RECOMPUTE,
    "student.placement": _PLACEMENTS,
    "teacher.placement": _PLACEMENTS,
    "data.chat_template": ("auto", "always", "never"),
    "data.overlong": ("drop", "error"),
    "mode.name": MODES,
    "mode.teacher_prompt.chat_template_of": ("student", "teacher"),
    "rollout.device": ("auto", "cuda", "cpu"),
    "rollout.dtype": ("auto", *_DTYPES, "fp16"),
    "rollout.weight_sync": ("distributed", "disk"),
    "rollout.weight_backend": ("auto", "nccl", "gloo"),
    "prefix.recall.signal": ("kl", "overlap"),
    "loss.weights.rule": ("uniform", "discrepancy", "change_point", "entropy", "reward"),
    "log.metrics_host": ("127.0.0.1", "job"),
    "loss.divergence": ("reverse_kl", "forward_kl", "jsd", "relaxed_kl"),
    "optimizer.lr_decay_style": ("linear", "cosine", "constant", "inverse-square-root"),
}


@dataclass(frozen=True)
class Range:
    """Finite numbers from ``low`` to ``high``; an open end does not belong to it."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        above = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        if self.high == math.inf:
            return above
        return f"{above} and {'below' if self.open_high else 'at most'} {self.high:g}"


_COUNT = Range(1)  # at least one of it
_NOT_NEGATIVE = Range(0)
_FINITE = Range(0, math.inf, open_high=True)
_POSITIVE = Range(0, math.inf, open_low=True, open_high=True)
_BETA = Range(0, 1, open_high=True)

RANGES: dict[str, Range] = {
    "run.world_size": _NOT_NEGATIVE,
    "run.distributed_timeout_s": _POSITIVE,
    "run.gpu_memory_gib": _FINITE,
    "run.gpu_reserve_gib": _FINITE,
    "run.max_restarts": _NOT_NEGATIVE,
    **{
        f"{model}.{key}": allowed
        for model in ("student", "teacher")
        for key, allowed in {
            "tensor_model_parallel_size": _COUNT,
            "pipeline_model_parallel_size": _COUNT,
            "num_layers_in_first_pipeline_stage": _NOT_NEGATIVE,
            "expert_model_parallel_size": _COUNT,
            "expert_tensor_parallel_size": _NOT_NEGATIVE,
            "context_parallel_size": _COUNT,
            "world_size": _NOT_NEGATIVE,
            "server.top_k": _COUNT,
            "server.num_servers": _COUNT,
            "server.tensor_parallel_size": _COUNT,
            "server.first_gpu": _NOT_NEGATIVE,
            "server.max_total_tokens": _NOT_NEGATIVE,
            "server.start_timeout_s": _POSITIVE,
            "server.request_timeout_s": _POSITIVE,
            "server.restarts": _NOT_NEGATIVE,
            "server.retries": _NOT_NEGATIVE,
        }.items()
    },
    "data.max_prompt_length": _COUNT,
    "data.seed": _NOT_NEGATIVE,
    "mode.written_share": Range(0, 1),
    "mode.warmup_steps": _NOT_NEGATIVE,
    "mode.refresh_teacher_every": _NOT_NEGATIVE,
    "mode.teacher_prompt.max_length": _NOT_NEGATIVE,
    "prefix.min_length": _COUNT,
    "prefix.max_length": _COUNT,
    "prefix.overlap_k": _NOT_NEGATIVE,
    "rollout.num_servers": _COUNT,
    "rollout.server_tensor_parallel_size": _COUNT,
    "rollout.max_total_tokens": _NOT_NEGATIVE,
    "rollout.first_gpu": Range(-1),
    "rollout.start_timeout_s": _POSITIVE,
    "rollout.request_timeout_s": _POSITIVE,
    "rollout.hang_timeout_s": _POSITIVE,
    "rollout.server_restarts": _NOT_NEGATIVE,
    "rollout.sync_timeout_s": _POSITIVE,
    "rollout.retries": _NOT_NEGATIVE,
    "rollout.samples_per_prompt": _COUNT,
    "rollout.temperature": _POSITIVE,
    "rollout.over_sample": Range(1, math.inf, open_high=True),
    "rollout.keep_aborted_above": _NOT_NEGATIVE,
    "rollout.bucket_mib": _POSITIVE,
    "rollout.verify_weights_every": _NOT_NEGATIVE,
    "rollout.logprob_tolerance": Range(0, open_low=True),
    "loss.beta": Range(0, 1, open_low=True, open_high=True),
    "loss.mixture": Range(0, 0.5, open_low=True),
    "loss.temperature": _POSITIVE,
    "loss.chunk_size": _NOT_NEGATIVE,
    "loss.weights.scale": _POSITIVE,
    "loss.weights.floor": Range(0, 1, open_low=True),
    "loss.weights.min_tokens": _COUNT,
    "loss.weights.strength": _POSITIVE,
    "loss.weights.share": Range(0, 1, open_low=True),
    "loss.weights.explore": Range(0, 1),
    "optimizer.lr": _FINITE,
    "optimizer.min_lr": _FINITE,
    "optimizer.lr_warmup_steps": _NOT_NEGATIVE,
    "optimizer.adam_beta1": _BETA,
    "optimizer.adam_beta2": _BETA,
    "optimizer.adam_eps": _POSITIVE,
    "optimizer.weight_decay": _FINITE,
    "optimizer.clip_grad": _FINITE,
    "train.steps": _COUNT,
    "train.global_batch_size": _COUNT,
    "train.micro_batch_size": _COUNT,
    "train.seed": _NOT_NEGATIVE,
    "train.max_skipped_steps": _COUNT,
    "checkpoint.save_interval": _NOT_NEGATIVE,
    "checkpoint.keep_last": _NOT_NEGATIVE,
    "checkpoint.keep_every": _NOT_NEGATIVE,
    "eval.max_new_tokens": _COUNT,
    "eval.samples": _NOT_NEGATIVE,
    "eval.interval": _NOT_NEGATIVE,
    "eval.own_servers": _NOT_NEGATIVE,
    "eval.stop_wait_s": _FINITE,
    "log.log_interval": _COUNT,
    "log.kl_by_position_interval": _NOT_NEGATIVE,
    "log.sample_rollouts_interval": _NOT_NEGATIVE,
    "log.sample_rollouts": _NOT_NEGATIVE,
    "log.probe_interval": _NOT_NEGATIVE,
    "log.probe_rollouts": _COUNT,
    "log.alarm_tail": _NOT_NEGATIVE,
    "log.alarm_agreement": Range(0, 1),
    "log.metrics_port": Range(0, 65535),
}


def check_settings(recipe: Recipe) -> None:
    """ValueError that names the first setting outside its names or its range."""
    for key, names in CHOICES.items():
        check_choice(key, setting(recipe, key), names)
    for key, allowed in RANGES.items():
        value = setting(recipe, key)
        if not allowed.holds(value):
            raise ValueError(f"{key}={value} must be {allowed}")
    for domain, teacher in recipe.teachers.items():
        try:
            check_settings(replace(recipe, teacher=teacher, teachers={}))
        except ValueError as error:
            raise ValueError(f"teachers.{domain}: {error}") from error


def check_choice(key: str, value: str, names: tuple[str, ...]) -> None:
    """ValueError with the nearest name where ``value`` is none of ``names``."""
    if value not in names:
        near = difflib.get_close_matches(value, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{key}={value!r} is not one of {', '.join(names)}.{hint}")


def setting(recipe: Recipe, key: str) -> Any:
    """The value at a dotted key."""
    return reduce(getattr, key.split("."), recipe)
