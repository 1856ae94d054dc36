"""One streamed generation: a server's events to tokens, and where a rule cuts them. Pure.

SGLang sends server-sent events, ``data: {...}``, each with the tokens since the last one
(``--incremental-streaming-output``, set for servers that we start) or with all tokens so far. Both
are understood: ``completion_tokens`` says how many there are.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_prefix.prefix import CutOff, SampledToken
from megatron_prefix.rollout import protocol
from megatron_prefix.rollout.protocol import Generation, UnexpectedAnswer

_DATA, _DONE = b"data:", b"[DONE]"


class EventReader:
    """The JSON objects of an event stream, out of its bytes in pieces as they arrive."""

    def __init__(self, url: str) -> None:
        self._url, self._rest = url, b""

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """UnexpectedAnswer for an event that is no JSON object, or that tells of an error."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            text = line.strip()
            if text.startswith(_DATA) and (body := text[len(_DATA) :].strip()) != _DONE:
                yield self._event(body)

    def _event(self, body: bytes) -> dict[str, Any]:
        try:
            event = json.loads(body)
        except ValueError as error:
            raise self._unexpected(body.decode(errors="replace")) from error
        if not isinstance(event, dict) or "error" in event:
            raise self._unexpected(event)
        return event

    def _unexpected(self, event: Any) -> UnexpectedAnswer:
        return UnexpectedAnswer(f"{self._url} streamed no generation: {protocol.shown(event)}")


class StreamedGeneration:
    """Gathers one generation; ``cut`` turns true when the rule says that it ends."""

    def __init__(self, cut_off: CutOff, url: str) -> None:
        self._cut_off, self._url = cut_off, url
        self._ids: list[int] = []
        self._logprobs: list[float] = []
        self._meta: dict[str, Any] = {}
        self._kept = -1  # tokens up to the cut; -1: not cut

    @property
    def cut(self) -> bool:
        return self._kept >= 0

    def add(self, event: dict[str, Any]) -> None:
        """Raises UnexpectedAnswer for an event without what is needed of it."""
        try:
            meta = event["meta_info"]
            fresh = int(meta["completion_tokens"]) - len(self._ids)
            ids = _last(event["output_ids"], fresh)
            entries = _last(meta.get("output_token_logprobs") or [], fresh)
            top = meta.get("output_top_logprobs")
            tokens = _tokens(entries, _last(top, fresh) if top else [])
            if [int(entry[1]) for entry in entries] != [int(token) for token in ids]:
                raise ValueError(f"{len(ids)} tokens, log-probabilities of {len(entries)}")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UnexpectedAnswer(
                f"{self._url} streamed an event without what is needed of it "
                f"({type(error).__name__}: {error}): {protocol.shown(event)}"
            ) from error
        self._meta = meta
        self._take(ids, tokens)

    def _take(self, ids: Sequence[Any], tokens: Sequence[SampledToken]) -> None:
        for token_id, token in zip(ids, tokens, strict=True):
            self._ids.append(int(token_id))
            self._logprobs.append(token.logprob)
            if not self.cut and self._cut_off.feed(token):
                self._kept = len(self._ids)

    def result(self) -> Generation:
        """After the last event. A rollout that ended by itself at its cut is not called cut."""
        if not self._meta.get("finish_reason"):
            raise UnexpectedAnswer(
                f"{self._url} ended its stream after {len(self._ids)} tokens without a finish "
                "reason; look into the server's log"
            )
        reason, version = protocol.finish(self._meta, self._url)
        whole = Generation(tuple(self._ids), tuple(self._logprobs), reason, version)
        if not self.cut or (self._kept == len(self._ids) and reason != "abort"):
            return whole
        kept = slice(self._kept)
        return Generation(
            whole.token_ids[kept],
            whole.logprobs[kept],
            "cut",
            version,
            discarded=len(self._ids) - self._kept,
        )


def _last(values: Sequence[Any], count: int) -> Sequence[Any]:
    if not 0 <= count <= len(values):
        raise ValueError(f"{count} new tokens among {len(values)}")
    return values[len(values) - count :]


def _tokens(entries: Sequence[Any], top: Sequence[Any]) -> list[SampledToken]:
    """From ``[[logprob, id, text], ...]`` and, where asked for, k such triples a token."""
    best = top or [()] * len(entries)
    return [
        SampledToken(float(entry[0]), tuple(float(one[0]) for one in likely))
        for entry, likely in zip(entries, best, strict=True)
    ]
