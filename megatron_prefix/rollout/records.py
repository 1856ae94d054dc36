"""Rollouts of a step, on disk: recorded to be trained on again without a server.

One safetensors file a step: flat arrays with lengths beside them. Log-probabilities are float32,
as the server computed them, so that a replayed step is the recorded one to the last bit. Of what
was sampled for the step and thrown away the lengths are kept, so that its ledger is the same too.
"""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megatron_prefix.rollout.discarded import Lengths
from megatron_prefix.run_files.whole_file import whole_file
from megatron_prefix.types import FinishReason, Rollout

_THROWN_AWAY = "thrown_away"  # int32 [rollouts, 2]: prompt and sampled tokens
_FINISH_REASONS: tuple[FinishReason, ...] = get_args(FinishReason)


def rollout_file(folder: str | Path, step: int) -> Path:
    return Path(folder, f"rollouts-{step:08d}.safetensors")


def recorded_steps(folder: str | Path) -> int:
    """How many steps are recorded there; 0 where it is no such folder."""
    return sum(1 for _ in Path(folder).glob("rollouts-*.safetensors"))


def save_rollouts(
    folder: str | Path, step: int, rollouts: Sequence[Rollout], discarded: Sequence[Lengths] = ()
) -> Path:
    """Write a step's rollouts, in their order, and the lengths of those that were thrown away; an
    earlier record of the step is replaced."""
    path = rollout_file(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    thrown_away = np.array(discarded, np.int32).reshape(-1, 2)
    with whole_file(path) as file:
        save_file(_arrays(rollouts) | {_THROWN_AWAY: thrown_away}, file)
    return path


def load_rollouts(folder: str | Path, step: int) -> list[Rollout]:
    """The rollouts of a step, equal to those that were saved.

    Raises ValueError naming the file where it is missing or damaged.
    """
    return load_record(folder, step)[0]


def load_record(folder: str | Path, step: int) -> tuple[list[Rollout], list[Lengths]]:
    """The rollouts of a step as :func:`load_rollouts`, and the lengths of those thrown away."""
    path = rollout_file(folder, step)
    if not path.is_file():
        raise ValueError(
            f"no recorded rollouts of step {step}: {path} is missing; record a run with "
            "rollout.record=true, or replay fewer steps"
        )
    try:
        arrays = load_file(path)
        # A record of an earlier version does not tell.
        thrown_away = arrays.get(_THROWN_AWAY, np.zeros((0, 2), np.int32)).tolist()
        return _rollouts(arrays), [(prompt, sampled) for prompt, sampled in thrown_away]
    except (SafetensorError, KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"{path} is no complete record of rollouts ({type(error).__name__}: {error})"
        ) from error


def _arrays(rollouts: Sequence[Rollout]) -> dict[str, np.ndarray]:
    """Flat arrays; the log-probabilities have the prefixes' lengths."""

    def flat(parts: Sequence[Sequence[float]], dtype: type) -> np.ndarray:
        return np.array([value for part in parts for value in part], dtype)

    def each(values: Sequence[int], dtype: type) -> np.ndarray:
        return np.array(values, dtype)

    return {
        "prompt_ids": flat([rollout.prompt_ids for rollout in rollouts], np.int32),
        "prompt_lengths": each([len(rollout.prompt_ids) for rollout in rollouts], np.int32),
        "prefix_ids": flat([rollout.prefix_ids for rollout in rollouts], np.int32),
        "prefix_lengths": each([len(rollout.prefix_ids) for rollout in rollouts], np.int32),
        "rollout_logprobs": flat([rollout.rollout_logprobs for rollout in rollouts], np.float32),
        "finish_reasons": each(
            [_FINISH_REASONS.index(rollout.finish_reason) for rollout in rollouts], np.int8
        ),
        "policy_versions": each([rollout.policy_version for rollout in rollouts], np.int64),
        "prompt_indices": each([rollout.prompt_index for rollout in rollouts], np.int64),
        "discarded": each([rollout.discarded for rollout in rollouts], np.int32),
        "written": each([rollout.written for rollout in rollouts], np.int8),
        "teacher_prompt_ids": flat([r.teacher_prompt_ids for r in rollouts], np.int32),
        "teacher_prompt_lengths": each([len(r.teacher_prompt_ids) for r in rollouts], np.int32),
        # Names as the bytes of a JSON list: safetensors holds numbers alone.
        "domains": np.frombuffer(json.dumps([r.domain for r in rollouts]).encode(), np.uint8),
    }


def _rollouts(arrays: dict[str, np.ndarray]) -> list[Rollout]:
    prompts = _cut(arrays["prompt_ids"], arrays["prompt_lengths"])
    prefixes = _cut(arrays["prefix_ids"], arrays["prefix_lengths"])
    logprobs = _cut(arrays["rollout_logprobs"], arrays["prefix_lengths"])
    return [
        Rollout(
            prompt_ids=tuple(prompt),
            prefix_ids=tuple(prefix),
            rollout_logprobs=tuple(logprob),
            finish_reason=_FINISH_REASONS[reason],
            policy_version=version,
            prompt_index=index,
            written=bool(written),
            teacher_prompt_ids=tuple(teachers),
            domain=domain,
            discarded=past,
        )
        for prompt, prefix, logprob, reason, version, index, written, teachers, domain, past in zip(
            prompts,
            prefixes,
            logprobs,
            arrays["finish_reasons"].tolist(),
            arrays["policy_versions"].tolist(),
            arrays["prompt_indices"].tolist(),
            arrays["written"].tolist(),
            _cut(arrays["teacher_prompt_ids"], arrays["teacher_prompt_lengths"]),
            json.loads(arrays["domains"].tobytes()),
            arrays.get("discarded", np.zeros(len(prompts), np.int32)).tolist(),  # older: not told
            strict=True,
        )
    ]


def _cut(flat: np.ndarray, lengths: np.ndarray) -> list[list]:
    """The parts of ``flat``, of ``lengths``, as lists of Python numbers."""
    ends = list(itertools.accumulate(lengths.tolist(), initial=0))
    if ends[-1] != len(flat):
        raise ValueError(f"{len(flat)} values for lengths that add up to {ends[-1]}")
    values = flat.tolist()
    return [values[start:end] for start, end in itertools.pairwise(ends)]
