"""What a server is asked that only scores, and what is made of its answer. Pure: no HTTP here.

SGLang answers log-probabilities of a prompt's own positions: entry i of ``input_top_logprobs`` is
the distribution that predicts token i, given those before it, and the entry of the first position
asked for is null. They are of the bare logits, whatever temperature the request names.

Legend: S scored tokens of a passage, k tokens named at each.
"""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_prefix.rollout.protocol import UnexpectedAnswer, shown

_ROUNDING = 1e-4
_CERTAIN = 1 - 2.0**-23  # the most that fp32 log-probabilities tell from 1
_SPARE = 16  # tokens asked for besides, where the teacher has more ids than the student
_DTYPES = {"val": "float32", "idx": "int32"}


@dataclass(frozen=True)
class Passage:
    """A prompt and a prefix, of which the tokens from ``first`` on are scored."""

    ids: tuple[int, ...]
    first: int  # at least 1: nothing predicts token 0

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


@dataclass(frozen=True)
class TopRows:
    """A server's likeliest tokens, the likeliest first; row j predicts token ``first + j``."""

    ids: np.ndarray  # int32 or int64 [S, k]
    logprobs: np.ndarray  # float32 [S, k], over its whole vocabulary, at temperature 1


def score_body(passages: Sequence[Passage], top_k: int) -> dict[str, Any]:
    """The body of a ``/generate`` that samples nothing. The arrays travel as base64: 10.7 bytes a
    named token, half of what JSON's digits take."""
    return {
        "input_ids": [list(passage.ids) for passage in passages],
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": [passage.first - 1 for passage in passages],
        "top_logprobs_num": top_k,
        "return_flat_raw_top_logprobs": True,
        "return_flat_raw_top_logprobs_b64": True,
    }


def parse_scores(answer: Any, passages: Sequence[Passage], top_k: int, url: str) -> list[TopRows]:
    """One a passage; UnexpectedAnswer naming ``url`` where a row, a number or a token is missing
    or is none."""
    if not isinstance(answer, list) or len(answer) != len(passages):
        raise UnexpectedAnswer(
            f"{url}/generate answered no list of {len(passages)} scores: {shown(answer)}"
        )
    return [
        _parse_one(entry, passage, top_k, url)
        for entry, passage in zip(answer, passages, strict=True)
    ]


def _parse_one(entry: Any, passage: Passage, top_k: int, url: str) -> TopRows:
    try:
        meta = entry["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            raise ValueError(f"it was aborted: {meta['finish_reason'].get('message', '')}")
        logprobs, ids = (_array(meta, name) for name in ("val", "idx"))
        shape = tuple(meta["input_top_logprobs_shape"])
        skipped = meta["input_top_logprobs_null_prefix"]
        if shape != (passage.scored, top_k) or skipped != 1:
            raise ValueError(
                f"{list(shape)} log-probabilities behind {skipped} empty positions, not "
                f"{[passage.scored, top_k]} behind 1"
            )
        return _checked(TopRows(ids.reshape(shape), logprobs.reshape(shape)))
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise UnexpectedAnswer(
            f"{url}/generate answered scores that cannot be used "
            f"({type(error).__name__}: {error}): {shown(entry)}"
        ) from error


def _array(meta: dict[str, Any], name: str) -> np.ndarray:
    field, dtype = f"input_top_logprobs_{name}_flat_b64", _DTYPES[name]
    if meta[f"{field}_dtype"] != dtype:
        raise ValueError(f"{field} is {meta[f'{field}_dtype']}, not {dtype}")
    return np.frombuffer(base64.b64decode(meta[field], validate=True), np.dtype(dtype))


def _checked(rows: TopRows) -> TopRows:
    """ValueError that names the first scored token with a number that is no log-probability."""
    # A kernel's rounding may leave a certain token a hair above 0.
    bad = ~(rows.logprobs <= _ROUNDING) | np.isinf(rows.logprobs) | (rows.ids < 0)
    if bad.any():
        row, column = (int(each) for each in np.argwhere(bad)[0])
        raise ValueError(
            f"scored token {row} has log-probability {rows.logprobs[row, column]} of token "
            f"{rows.ids[row, column]}"
        )
    return TopRows(rows.ids, np.minimum(rows.logprobs, 0.0))


@dataclass(frozen=True)
class Vocabulary:
    """What a teacher's token ids mean to a student of the same tokenizer."""

    teacher: int  # ids that the teacher has, its padding included
    common: int  # ids that both have: the smaller of their two vocabularies
    exchanged: Mapping[int, int] = field(default_factory=dict)  # ids that change places

    def asked(self, top_k: int) -> int:
        """How many tokens to ask for, so that ``top_k`` of them are the student's too.

        Never more than the teacher has: SGLang 0.5.23 ends when it is asked for more.
        """
        return min(top_k + min(self.teacher - self.common, _SPARE), self.teacher)

    def check(self, passages: Sequence[Passage]) -> None:
        """ValueError for an id that the teacher does not have, to which SGLang gives a meaning."""
        for passage in passages:
            if max(passage.ids) >= self.teacher:
                raise ValueError(
                    f"token {max(passage.ids)} of a rollout is none of the teacher's "
                    f"{self.teacher}: the student sampled one of its padding"
                )


def common_top_k(rows: Sequence[TopRows], vocabulary: Vocabulary, top_k: int) -> TopRows:
    """The ``top_k`` likeliest tokens [N, top_k] that the student has too, of all ``rows`` in turn.

    The teacher's padding is taken out and its mass shared out over the rest, as a loss over the
    common vocabulary does. Where a row has fewer that are left, all rows get no more: the tail
    holds the others. ValueError where one has none.
    """
    ids = np.concatenate([each.ids for each in rows]).astype(np.int64)
    logprobs = np.concatenate([each.logprobs for each in rows])
    swapped = ids.copy()
    for one, other in vocabulary.exchanged.items():
        swapped[ids == one], swapped[ids == other] = other, one
    outside = swapped >= vocabulary.common
    if not outside.any():
        return TopRows(swapped[:, :top_k], logprobs[:, :top_k])
    lost = np.where(outside, np.exp(logprobs, dtype=np.float64), 0.0).sum(1, keepdims=True)
    logprobs = (logprobs - np.log1p(-np.minimum(lost, _CERTAIN))).astype(np.float32)
    least = int((~outside).sum(1).min(initial=top_k))
    if least == 0:
        row = int(np.argmin((~outside).sum(1)))
        raise ValueError(
            f"all {ids.shape[1]} tokens that the teacher names at scored position {row} are above "
            f"{vocabulary.common}, the ids that the student has too"
        )
    # Stable: those inside first, in the order of their probabilities.
    order = np.argsort(outside, axis=1, kind="stable")[:, : min(least, top_k)]
    return TopRows(np.take_along_axis(swapped, order, 1), np.take_along_axis(logprobs, order, 1))
