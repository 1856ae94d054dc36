"""What is said to an SGLang server and what is made of its answers. Pure: no HTTP here.

Legend: B prompts of a request, P prompt tokens, L_i sampled tokens of generation i.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

ServerFinish = Literal["stop", "length", "abort"]
GenerationFinish = Literal["stop", "length", "abort", "cut"]
_VERSION_LABEL = re.compile(r"v(\d+)")
_SHOWN = 300  # characters of an answer that an error quotes


class SglangError(RuntimeError):
    """A server could not be used; the message names it and says what it did."""


class NoRollouts(SglangError):
    """Every rollout that was asked for was aborted or came back empty."""


class ServerUnavailable(SglangError):
    """No connection, no answer in time, or a 5xx, after all retries."""


class NoAnswer(ServerUnavailable):
    """The server was reached, and answered nothing for as long as was waited."""


class RequestRefused(SglangError):
    """A 4xx, or ``success: false``; the message has the server's words."""


class UnexpectedAnswer(SglangError):
    """An answer that does not hold what the API promises; the message quotes it."""


class OtherWeights(UnexpectedAnswer):
    """An answer of other weights than the server was given."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: from the bare softmax at ``temperature``, with no truncation."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: greedy
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} must be at least 1; check prefix.min_length"
            )

    def parameters(self) -> dict[str, Any]:
        """SGLang's ``sampling_params``. top_p and top_k are named, since a checkpoint's
        generation_config.json may set others, and the loss needs samples of the policy itself."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "stop_token_ids": list(self.stop_token_ids),
        }


@dataclass(frozen=True)
class Generation:
    """One sampled continuation, as the server answers it."""

    token_ids: tuple[int, ...]  # [L_i], a stop token included
    logprobs: tuple[float, ...]  # [L_i], of the sampled tokens, at temperature 1
    finish_reason: GenerationFinish  # cut: by a rule of ours, while it was streamed
    policy_version: int  # of the weights that sampled the last token
    discarded: int = 0  # tokens that were sampled after a cut

    @property
    def sampled(self) -> int:
        """Tokens that it cost."""
        return len(self.token_ids) + self.discarded


def stream_body(
    prompt: Sequence[int], sampling: Sampling, request_id: str, *, top_k: int, every: int
) -> dict[str, Any]:
    """The body of a streamed ``/generate`` of one prompt: an event each ``every`` tokens, with
    ``top_k`` log-probabilities of each token beside its own."""
    body = generate_body([prompt], sampling)
    body["sampling_params"]["stream_interval"] = every
    body |= {"input_ids": list(prompt), "rid": request_id, "stream": True}
    if top_k:
        body["top_logprobs_num"] = top_k
    return body


def generate_body(
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    request_ids: Sequence[str] = (),
) -> dict[str, Any]:
    """The body of ``/generate`` for B prompts; ``request_ids`` [B] let them be aborted."""
    body: dict[str, Any] = {
        "input_ids": [list(prompt) for prompt in prompts],
        "sampling_params": sampling.parameters()
        if isinstance(sampling, Sampling)
        else [one.parameters() for one in sampling],
        "return_logprob": True,
        "logprob_start_len": -1,
    }
    if request_ids:
        assert len(request_ids) == len(prompts)
        body["rid"] = list(request_ids)
    return body


def version_label(policy_version: int) -> str:
    """The ``weight_version`` that names a policy version to SGLang."""
    return f"v{policy_version}"


def parse_generations(answer: Any, prompts: int, url: str) -> list[Generation]:
    """The B generations of a ``/generate`` answer.

    Raises UnexpectedAnswer naming ``url`` where there are not ``prompts`` of them, or where one
    lacks its tokens, log-probabilities, finish reason or policy version.
    """
    if not isinstance(answer, list) or len(answer) != prompts:
        count = len(answer) if isinstance(answer, list) else "no list of"
        raise UnexpectedAnswer(
            f"{url}/generate answered {count} generations to {prompts} prompts: {shown(answer)}"
        )
    return [_parse_one(entry, url) for entry in answer]


def _parse_one(entry: Any, url: str) -> Generation:
    try:
        meta = entry["meta_info"]
        tokens = tuple(int(token) for token in entry["output_ids"])
        logprobs, logged_tokens = _token_logprobs(meta)
        reason = _finish_reason(meta)
        version = _policy_version(meta)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UnexpectedAnswer(
            f"{url}/generate answered a generation without what is needed of it "
            f"({type(error).__name__}: {error}): {shown(entry)}"
        ) from error
    if logged_tokens != tokens:
        raise UnexpectedAnswer(
            f"{url}/generate answered {len(tokens)} tokens but log-probabilities of "
            f"{len(logged_tokens)}, or of others: {shown(entry)}"
        )
    return Generation(tokens, logprobs, reason, version)


def _token_logprobs(meta: dict[str, Any]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Log-probabilities and the tokens that they are of, from ``[[logprob, id, text], ...]``."""
    entries = meta.get("output_token_logprobs") or []
    logprobs = tuple(float(entry[0]) for entry in entries)
    for logprob in logprobs:
        if not math.isfinite(logprob):
            raise ValueError(f"log-probability {logprob}")
    return logprobs, tuple(int(entry[1]) for entry in entries)


def finish(meta: dict[str, Any], url: str) -> tuple[ServerFinish, int]:
    """How a generation ended and the policy version of its last token; UnexpectedAnswer naming
    ``url`` where it does not say so."""
    try:
        return _finish_reason(meta), _policy_version(meta)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UnexpectedAnswer(
            f"{url} ended a generation with no reason or version "
            f"({type(error).__name__}: {error}): {shown(meta)}"
        ) from error


def _finish_reason(meta: dict[str, Any]) -> ServerFinish:
    reason = meta["finish_reason"]["type"]
    if reason not in ("stop", "length", "abort"):
        raise ValueError(f"finish_reason {reason!r}")
    return reason


def _policy_version(meta: dict[str, Any]) -> int:
    """From the label of the last token's weights; ``weight_versions`` has one a token span."""
    spans = meta.get("weight_versions")
    label = spans[-1]["version"] if spans else meta["weight_version"]
    match = _VERSION_LABEL.fullmatch(str(label))
    if match is None:
        raise ValueError(f"weight version {label!r} is not v0, v1, ...: publish weights first")
    return int(match[1])


def read_answer(status: int, text: str, url: str) -> Any:
    """The body of an answer below 500 as JSON; None where it is empty.

    Raises RequestRefused for a 4xx, UnexpectedAnswer for what is not JSON.
    """
    if status >= 400:
        raise refusal(status, text, url)
    if not text:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UnexpectedAnswer(f"{url} answered something that is not JSON: {shown(text)}") from (
            error
        )


def too_slow(url: str, timeout_s: float, settings: str) -> NoAnswer:
    """Not tried again: the same request would be as slow, on a server that is busy with it."""
    return NoAnswer(
        f"{url} gave no answer within {timeout_s:g} s; raise {settings}.request_timeout_s or look "
        "into the server's log"
    )


def refusal(status: int, text: str, url: str) -> RequestRefused:
    """The error for a 4xx, with the server's own words where it gave any."""
    return RequestRefused(f"{url} refused the request with {status}: {_words(text)}")


def _words(text: str) -> str:
    """The message inside an error's body, in whichever of SGLang's forms it comes."""
    try:
        body = json.loads(text)
    except json.JSONDecodeError:
        return shown(text)
    while isinstance(body, dict):
        inner = [body[key] for key in ("error", "message", "detail") if key in body]
        if not inner:
            break
        body = inner[0]
    return shown(body)


def shown(value: Any) -> str:
    """``value`` on one line, short enough for an error message."""
    text = value if isinstance(value, str) else json.dumps(value)
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}... ({len(line)} characters)"
