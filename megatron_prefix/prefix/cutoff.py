"""Cut-offs: where one rollout ends before the step's prefix length. Pure: no torch, no HTTP.

A rule sees a rollout token by token while the server samples it, and says when its signal has
settled. It knows the past alone, so the tokens that are kept are what the student would have
written anyway: a cut rollout is on-policy. Legend: k the student's likeliest tokens that the
server names, V the vocabulary.
"""

import difflib
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from megatron_prefix.config import CutOffConfig
from megatron_prefix.users_code import call_users, import_by_path


@dataclass(frozen=True)
class SampledToken:
    """What a server tells of a token as it is sampled; log-probabilities at temperature 1."""

    logprob: float  # of the token itself
    top_logprobs: tuple[float, ...] = ()  # [k], the student's likeliest tokens


@runtime_checkable
class CutOff(Protocol):
    """One rollout's rule. A fresh one is built for each rollout."""

    def feed(self, token: SampledToken) -> bool:
        """Takes the next token; True: the rollout ends with it. Not asked again after that."""


class MovingMean:
    """Of the last ``window`` values."""

    def __init__(self, window: int) -> None:
        self._values: deque[float] = deque(maxlen=window)

    def add(self, value: float) -> float:
        """The mean with ``value``; infinite until the window is full."""
        self._values.append(value)
        full = len(self._values) == self._values.maxlen
        return math.fsum(self._values) / len(self._values) if full else math.inf


class _Settled:
    """Ends at the first token, from ``min_tokens`` on, at which the moving mean of a signal is at
    most ``threshold``."""

    def __init__(
        self, config: CutOffConfig, vocab_size: int, signal: Callable[[SampledToken, int], float]
    ) -> None:
        self._config, self._vocab_size, self._signal = config, vocab_size, signal
        self._mean, self._tokens = MovingMean(config.window), 0

    def feed(self, token: SampledToken) -> bool:
        self._tokens += 1
        mean = self._mean.add(self._signal(token, self._vocab_size))
        return self._tokens >= self._config.min_tokens and mean <= self._config.threshold


def surprisal(token: SampledToken, vocab_size: int) -> float:
    """-ln p of the sampled token, nats: at temperature 1 its mean is the student's entropy."""
    return -token.logprob


def entropy_bound(token: SampledToken, vocab_size: int) -> float:
    """The most entropy, in nats, that a distribution with these k largest probabilities can have:
    what they leave over lies evenly on the other V - k tokens."""
    known = math.fsum(math.exp(logprob) for logprob in token.top_logprobs)
    entropy = -math.fsum(math.exp(logprob) * logprob for logprob in token.top_logprobs)
    rest, others = 1.0 - known, vocab_size - len(token.top_logprobs)
    if rest <= 0.0 or others < 1:
        return entropy
    return entropy + rest * (math.log(others) - math.log(rest))


RULES: Mapping[str, Callable[[SampledToken, int], float]] = {
    "surprisal": surprisal,
    "entropy": entropy_bound,
}


class _UsersRule:
    """A user's own rule for one rollout; what it raises is a ValueError that names it."""

    def __init__(self, users: Callable[..., object], config: CutOffConfig, vocab_size: int) -> None:
        self._setting, self._tokens = f"prefix.cut_off.rule={config.rule}", 0
        inner = call_users(self._setting, "the class", users, config, vocab_size)
        if not isinstance(inner, CutOff):
            raise ValueError(f"prefix.cut_off.rule={config.rule!r} lacks feed(token)")
        self._inner = inner

    def feed(self, token: SampledToken) -> bool:
        self._tokens += 1
        asked = f"feed of a rollout's token {self._tokens}"
        return call_users(self._setting, asked, self._inner.feed, token)


@dataclass(frozen=True)
class CutOffRule:
    """What a sampler needs: a rule for each rollout, and what to ask the server for."""

    start: Callable[[], CutOff]
    top_k: int  # top_logprobs of every SampledToken
    check_every: int  # tokens between two looks at a rollout


def build_cut_off(config: CutOffConfig, vocab_size: int) -> CutOffRule | None:
    """The rule of a recipe's ``prefix.cut_off``, None where there is none.

    ValueError for a name or a setting that cannot be.
    """
    if config.rule == "none":
        return None
    start = _rule(config, vocab_size)
    _check(config)
    top_k = 0 if config.rule == "surprisal" else config.top_k
    rule = CutOffRule(start, top_k, config.check_every)
    rule.start()  # a user's own that cannot be built is refused now
    return rule


def _rule(config: CutOffConfig, vocab_size: int) -> Callable[[], CutOff]:
    if config.rule in RULES:
        signal = RULES[config.rule]
        return lambda: _Settled(config, vocab_size, signal)
    if ":" in config.rule:
        users = import_by_path("prefix.cut_off.rule", config.rule)
        return partial(_UsersRule, users, config, vocab_size)
    near = difflib.get_close_matches(config.rule, ("none", *RULES), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Choose one of none, {', '.join(RULES)}"
    raise ValueError(
        f"prefix.cut_off.rule={config.rule!r} is unknown. {hint} "
        "(or name your own: package.module:Class)"
    )


def _check(config: CutOffConfig) -> None:
    counts = {"window": config.window, "min_tokens": config.min_tokens}
    counts |= {"check_every": config.check_every}
    counts |= {"top_k": config.top_k} if config.rule == "entropy" else {}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"prefix.cut_off.{name}={count} must be at least 1 token")
    if not 0.0 < config.threshold < math.inf:
        raise ValueError(
            f"prefix.cut_off.threshold={config.threshold} must be above 0 nats; try 0.1"
        )
