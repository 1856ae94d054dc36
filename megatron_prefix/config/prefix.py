"""The settings of prefix policies and cut-offs; the package holds all others, and names these."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LinearConfig:
    """``linear``: from min_length to max_length over the first share ``over`` of the steps."""

    # Share of train.steps after which max_length is reached.
    over: float = 0.8


@dataclass(frozen=True)
class AnchoredConfig:
    """``anchored``: min_length, with every ``every``-th step at max_length."""

    every: int = 8  # the last of every so many steps has max_length


@dataclass(frozen=True)
class LateConfig:
    """``late``: min_length for the first share ``full_after`` of the steps, then max_length."""

    full_after: float = 0.8  # share of train.steps after which each step has max_length


@dataclass(frozen=True)
class StepsConfig:
    """``steps``: ``stages`` lengths from min_length to max_length, evenly apart, the last of them
    reached after the first share ``over`` of the steps."""

    stages: int = 4  # different lengths, min_length and max_length included
    # Share of train.steps after which max_length is reached.
    over: float = 0.8


@dataclass(frozen=True)
class CosineConfig:
    """``cosine``: as linear, along half a cosine: slow at both ends, fast between them."""

    # Share of train.steps after which max_length is reached.
    over: float = 0.8


@dataclass(frozen=True)
class WindowConfig:
    """``window``: the loss on prefix positions ``start`` to ``stop - 1`` alone, counted from 0;
    rollouts are sampled up to ``stop``. min_length has no say."""

    start: int = 0  # first prefix position in the loss
    stop: int = 0  # 0: max_length


@dataclass(frozen=True)
class AdaptiveConfig:
    """``adaptive``: from min_length, ``factor`` times as long whenever the moving average of the
    steps' mean KL falls under ``threshold``; and what a probe does whose tail is worse."""

    factor: float = 1.5  # by which the length grows or shrinks
    threshold: float = 0.3  # nats a token; the length grows under it
    momentum: float = 0.9  # of the moving average: weight of the old value
    # shrink | grow | hold: by ``factor``, where a probe's KL beyond the prefix is more than
    # 1 + ``tail_tolerance`` times the lowest that probes have shown at this length
    on_tail: str = "shrink"
    tail_tolerance: float = 0.25  # share by which the tail's KL may rise before on_tail acts


@dataclass(frozen=True)
class AuditedConfig:
    """``audited``: from min_length, ``factor`` times as long after a probe in which the gradients
    of prefix and full rollout agree (cosine) less than ``low``, as short where more than
    ``high``."""

    factor: float = 1.5  # by which the length grows or shrinks
    low: float = 0.6  # agreement (cosine) below which the length grows
    high: float = 0.9  # agreement above which it shrinks


@dataclass(frozen=True)
class CutOffConfig:
    """Where one rollout ends before the step's length, while the server samples it."""

    # none | surprisal (-ln p of the sampled tokens) | entropy (bounded from the server's top_k):
    # cut where the mean over the last ``window`` tokens is at most ``threshold``; or
    # "package.module:Class" of a user's own
    rule: str = "none"
    threshold: float = 0.1  # nats a token
    window: int = 16  # tokens
    min_tokens: int = 32  # no rollout is cut before it has so many
    top_k: int = 20  # entropy: log-probabilities that the server sends of each token
    check_every: int = 4  # tokens between two looks; what is sampled past a cut is thrown away


@dataclass(frozen=True)
class MarginalConfig:
    """``marginal``: full length every ``audit_every`` steps; in between the length at which the
    audits showed the most KL a computed token, the shortest of the last ``audits`` of them."""

    audit_every: int = 12  # the first of every so many steps is an audit at max_length
    audits: int = 4  # the last ones, of which the shortest counts


@dataclass(frozen=True)
class OverlapConfig:
    """``overlap``: from min_length, ``factor`` times as long after a step in which no ``window``
    positions had a mean overlap of the models' top-k tokens under ``threshold``; else nearer to
    where the first such window begins."""

    factor: float = 1.5  # by which the length grows
    threshold: float = 0.5  # share of the top-k tokens that student and teacher both have
    window: int = 16  # positions
    momentum: float = 0.5  # weight of the old length where it moves to the reliable one


@dataclass(frozen=True)
class RecallConfig:
    """Caps for prompts that come again, from their last rollouts: ``slack`` times the tokens after
    which the mean ``signal`` of ``window`` of them was at most ``threshold``."""

    threshold: float = 0.0  # nats a token, or a share; 0: no caps
    # kl (the rollout has settled) | overlap (of the models' prefix.overlap_k likeliest tokens: it
    # has drifted from the teacher)
    signal: str = "kl"
    window: int = 16  # tokens
    min_tokens: int = 32  # least that a cap is predicted from
    slack: float = 1.25  # a cap is this many times the tokens that the prompt needed


@dataclass(frozen=True)
class PrefixConfig:
    """The prefix policy. ``prefix/`` holds one file a policy; lengths are in tokens."""

    # fixed | linear | steps | cosine | anchored | late | adaptive | audited | marginal | overlap |
    # window, or "package.module:Class" of a user's own
    policy: str = "linear"
    min_length: int = 64  # what policies start from, or keep; at least 1
    max_length: int = 1024  # full-length distillation would sample up to here
    linear: LinearConfig = field(default_factory=LinearConfig)
    steps: StepsConfig = field(default_factory=StepsConfig)
    cosine: CosineConfig = field(default_factory=CosineConfig)
    anchored: AnchoredConfig = field(default_factory=AnchoredConfig)
    late: LateConfig = field(default_factory=LateConfig)
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    marginal: MarginalConfig = field(default_factory=MarginalConfig)
    audited: AuditedConfig = field(default_factory=AuditedConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    window: WindowConfig = field(default_factory=WindowConfig)
    # Likeliest tokens of student and teacher that are compared at each prefix position; 0: none.
    overlap_k: int = 0
    cut_off: CutOffConfig = field(default_factory=CutOffConfig)
    recall: RecallConfig = field(default_factory=RecallConfig)
    options: dict[str, float] = field(default_factory=dict)  # for a user's own policy
