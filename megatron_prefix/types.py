"""The values that travel between the parts: frozen, with a shape and a dtype on every field.

Legend: P prompt tokens, L_i prefix tokens of rollout i, T packed tokens of a microbatch,
B sequences in it, N prefix positions in it, d_t the teacher's hidden size, k its tokens a position.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "cut", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One prompt of the stream."""

    index: int  # its position in the stream: unique over the run, epochs counted on
    row: int  # its row in the data set
    input_ids: tuple[int, ...]  # [P]
    answer_ids: tuple[int, ...] = ()  # the written answer, where the data set has one
    teacher_ids: tuple[int, ...] = ()  # the teacher's prompt, where it is another one
    domain: str = ""  # which of several teachers scores it; empty: the recipe's `teacher`


@dataclass(frozen=True)
class Rollout:
    """One sampled prefix. ``finish_reason``: stop at an end token, length at the prefix length,
    cut by a per-rollout rule, abort as a straggler.

    Where rank 0 sent it, the sequences are views of what came: most ranks need the lengths of all
    and the tokens of a few."""

    prompt_ids: Sequence[int]  # [P]
    prefix_ids: Sequence[int]  # [L_i], an end token included
    rollout_logprobs: Sequence[float]  # [L_i] of the sampled tokens, at temperature 1
    finish_reason: FinishReason
    policy_version: int  # of the weights that sampled the last token
    prompt_index: int
    domain: str = ""  # its prompt's
    written: bool = False  # before the run: no server sampled it, and rollout_logprobs are NaN
    teacher_prompt_ids: Sequence[int] = ()  # what the teacher reads instead; empty: the same
    discarded: int = 0  # tokens that the server sampled past a cut, and nobody sees


@dataclass(frozen=True)
class PrefixBatch:
    """One packed microbatch, or a context-parallel rank's share of it (``context_shares.py``).
    Position ``prefix_positions[n]`` *predicts* ``labels[n]``."""

    input_ids: "torch.Tensor"  # int64 [T]
    position_ids: "torch.Tensor"  # int64 [T], from 0 in each sequence
    cu_seqlens: "torch.Tensor"  # int32 [B+1]; the last sequence may be padding
    max_seqlen: int
    prefix_positions: "torch.Tensor"  # int64 [N], indices into T
    labels: "torch.Tensor"  # int64 [N], the sampled tokens
    token_weight: "torch.Tensor"  # float32 [N]; sums to 1 over all microbatches of all ranks
    rollout_logprobs: "torch.Tensor"  # float32 [N], the server's; NaN where none sampled the token
    ends: "torch.Tensor"  # int64 [E], indices into N of the stop tokens that ended a rollout
    prefix_offsets: "torch.Tensor"  # int64 [N], 0 for a rollout's first sampled token; a window
    # of the loss leaves the first ones out
    domain: str = ""  # of all its rollouts
    rows: "Rows | None" = None  # of a share; None: the whole microbatch


@dataclass(frozen=True)
class Rows:
    """Which of a microbatch's N prefix positions a context-parallel rank has."""

    index: "torch.Tensor"  # int64 [n]
    count: int  # N


@dataclass(frozen=True)
class TeacherTargets:
    """The teacher's final hidden states (after its last norm) for one student microbatch."""

    hidden: "torch.Tensor"  # [N, d_t], in the teacher's params_dtype


@dataclass(frozen=True)
class TopKTargets:
    """What a teacher that gives no hidden states says of one student microbatch: its k likeliest
    tokens at each prefix position. The same on all tensor-parallel ranks of the student."""

    ids: "torch.Tensor"  # int64 [N, k], distinct in a row
    logprobs: "torch.Tensor"  # float32 [N, k], over the whole vocabulary, at the loss's temperature


Targets = TeacherTargets | TopKTargets


@dataclass(frozen=True)
class TeacherHead:
    """The teacher's LM head in the student's vocabulary shards, held once."""

    weight: "torch.Tensor"  # [V/tp, d_t]; zeros past the vocabulary
    vocab_size: int  # tokens that both models know: the smaller of their two vocabularies


@dataclass(frozen=True)
class Flops:
    """FLOPs by part; a multiply-add is two."""

    rollout: float = 0.0
    teacher: float = 0.0
    student: float = 0.0

    @property
    def total(self) -> float:
        return self.rollout + self.teacher + self.student

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.rollout + other.rollout, self.teacher + other.teacher, self.student + other.student
        )


@dataclass(frozen=True)
class ProbeMetrics:
    """What a few full-length rollouts show that are scored and not trained on."""

    step: int  # the weights after this step; 0: before training
    prefix_length: int  # of the step to come
    kl_prefix: float  # nats a token, mean before prefix_length
    kl_tail: float  # mean from prefix_length on; NaN where no rollout went that far
    kl_by_position: "np.ndarray"  # float64 [max_length]
    tokens_by_position: "np.ndarray"  # int64 [max_length]
    finished: int  # rollouts that ended by themselves
    rollouts: int
    flops: Flops  # not part of the ledger's totals
    agreement: float = math.nan  # cosine of prefix and full gradients; NaN: not measured


@dataclass(frozen=True)
class StepMetrics:
    """What a step reports. Values are global: reduced over all ranks."""

    step: int  # from 1
    loss: float  # the weighted mean divergence that was differentiated
    kl_by_position: "np.ndarray"  # float64 [prefix_length], mean; NaN where no token was scored
    tokens_by_position: "np.ndarray"  # int64 [prefix_length]
    grad_norm: float
    lr: float
    skipped: bool  # a non-finite loss or gradient: no update was made
    prefix_length: int
    prefix_tokens: int  # sampled; tokens_by_position counts those in the loss
    prompt_tokens: int
    cut_fraction: float  # of rollouts that reached the prefix length, by design or by cap
    policy_version: int
    policy_lag: float  # mean of policy_version - rollout's policy_version
    logprob_diff_max: float  # |server - trainer| over the step's sampled tokens
    logprob_diff_mean: float
    flops: Flops = Flops()
    flops_full: Flops = Flops()  # the same step's full-length counterfactual
    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    effective_share: float = 1.0  # of the tokens in the loss; 1: all count alike
    cut_off_fraction: float = 0.0  # of rollouts that a per-rollout rule ended early
    stop_tokens: int = 0  # that ended a rollout, in the loss, and were scored by the teacher
    # Student's minus teacher's log-probability of them, mean; NaN where there was none.
    stop_logprob_diff: float = math.nan
    supervised: bool = False  # loss and kl_by_position are cross-entropies
    written_fraction: float = 0.0  # of the rollouts
    # Sampled and thrown away, past a cut or of stragglers; no part of prefix_tokens.
    discarded_tokens: int = 0
    # float64 [prefix_length], mean share of prefix.overlap_k likeliest tokens that both models
    # have, NaN where none was scored; [0] where none were compared
    overlap_by_position: "np.ndarray" = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True)
class Held:
    """What one rank holds of a model from the start on: bytes, and how many ``parameters``."""

    parameters: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    # Of the optimizer, by the rank that holds the shard: of what data-parallel ranks share, and of
    # what expert-data-parallel ones do. Empty: all hold as much.
    dense_shards: tuple[int, ...] = field(default=(), compare=False)
    expert_shards: tuple[int, ...] = field(default=(), compare=False)

    def optimizer_of(self, dp: int, expert_dp: int) -> int:
        """Bytes of the optimizer on another rank of the stage."""
        if not self.dense_shards:
            return self.optimizer
        return self.dense_shards[dp] + (self.expert_shards[expert_dp] if self.expert_shards else 0)
