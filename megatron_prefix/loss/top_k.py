"""The divergences where the teacher gives no more than its k likeliest tokens.

Legend: C positions, V real vocabulary rows of this rank's shard, R tensor-parallel ranks,
x = student logits / temperature. Both distributions are coarsened to k + 1 outcomes: each of the
teacher's k tokens, and the *tail*, which is every other token together. q_j, q_tail are the
teacher's probabilities, p_j, p_tail the student's, p_tail = sum p_v over the tail's tokens.

With d_b = ln p_b - ln q_b and K as in ``Kernels.mixture``, summed over outcomes b, the gradient to
x_v is p_v g_b / p_b for the outcome b of token v, where

| divergence | value | g_b |
|---|---|---|
| reverse_kl | D = sum p_b d_b | p_b (d_b - D) |
| forward_kl | -sum q_b d_b | p_b sum q - q_b |
| jsd | as of a whole vocabulary | -(1-beta) p_b (sp(a_b) - K) |

so within the tail it follows the student's own probabilities. The tail's p is summed, never taken
as 1 - sum, and relative to its own maximum: it may be far below what exp can hold in fp32.
"""

import math

import torch
from torch import Tensor

from megatron_prefix.loss.divergence import EMPTY_MAX, MAX_S, SUM_S, Divergence
from megatron_prefix.loss.rows import Rows
from megatron_prefix.loss.torch_kernels import row_blocks

# Of this rank's shard, behind MAX_S and SUM_S: the tail's maximum and sum; for reverse_kl sums of
# e_j and e_j (x_j - m_s - ln q_j) over its top tokens, for forward_kl of q_j and
# q_j (ln q_j - x_j + m_s).
MAX_TAIL, SUM_TAIL, TOP_MASS, TOP_CROSS = 2, 3, 4, 5
_COLUMNS = 6

# k fp32 log-probabilities tell the mass that they leave over only to this: a tail that rounds to
# nothing would make every student's reverse_kl infinite.
SMALLEST_TAIL = 2.0**-23


class TopKRows(Rows):
    """``student`` fp32 [C, V] raw, ``ids`` int64 [C, k] over the whole vocabulary, ``logprobs``
    fp32 [C, k]; a token with an id outside the vocabulary becomes NaN."""

    def __init__(
        self,
        student: Tensor,
        ids: Tensor,
        logprobs: Tensor,
        first_row: int,
        vocab_size: int,
        divergence: Divergence,
    ) -> None:
        own = ids - first_row
        self._student, self._divergence = student, divergence
        self._held = (own >= 0) & (own < student.shape[1])
        self._columns = own.clamp(0, max(student.shape[1] - 1, 0))
        inside = (ids >= 0) & (ids < vocab_size)
        self._log_q = torch.where(inside, logprobs.double(), torch.nan)
        rest = -torch.expm1(self._log_q.logsumexp(1))
        self._log_q_tail = rest.clamp_min(SMALLEST_TAIL).log()

    def statistics(self) -> Tensor:
        student = self._student
        result = student.new_zeros((student.shape[0], _COLUMNS), dtype=torch.float64)
        result[:, MAX_S] = result[:, MAX_TAIL] = EMPTY_MAX
        self._top = torch.full_like(self._log_q, EMPTY_MAX)  # x of the tokens of this shard
        if student.shape[1]:
            self._take_top()
            for rows in row_blocks(student):
                _tail_statistics(student[rows], self._divergence.temperature, result[rows])
            self._add_top(result)
        self._own_max_tail = result[:, MAX_TAIL]
        return result

    def _take_top(self) -> None:
        """Takes the top tokens' logits out of the buffer, so that only the tail is left there."""
        picked = self._student.gather(1, self._columns).double() / self._divergence.temperature
        self._top = torch.where(self._held, picked, EMPTY_MAX)
        # A token that is not held points at any column: its minimum with infinity leaves it.
        taken = torch.where(self._held, -torch.inf, torch.inf).float()
        self._student.scatter_reduce_(1, self._columns, taken, "amin")

    def _add_top(self, result: Tensor) -> None:
        maximum = torch.maximum(result[:, MAX_TAIL], self._top.amax(1))
        above = self._top - maximum[:, None]
        tail = (result[:, MAX_TAIL] - maximum).exp() * result[:, SUM_TAIL]
        result[:, MAX_S], result[:, SUM_S] = maximum, tail + above.exp().sum(1)
        mass, log_ratio = above.exp(), above - self._log_q
        if self._divergence.name == "forward_kl":
            mass, log_ratio = self._log_q.exp(), -log_ratio
        mass = torch.where(self._held, mass, 0.0)
        result[:, TOP_MASS], result[:, TOP_CROSS] = mass.sum(1), _times(mass, log_ratio).sum(1)

    def merge(self, gathered: Tensor) -> Tensor | None:
        maximum, self._max_tail = gathered[..., MAX_S].amax(0), gathered[..., MAX_TAIL].amax(0)
        shift = gathered[..., MAX_S] - maximum
        log_sum = (shift.exp() * gathered[..., SUM_S]).sum(0).log()
        tails = (gathered[..., MAX_TAIL] - self._max_tail).exp() * gathered[..., SUM_TAIL]
        self._sum_tail = tails.sum(0)
        self._log_p = self._top - (maximum + log_sum)[:, None]
        self._log_p_tail = self._max_tail + self._sum_tail.log() - maximum - log_sum
        if self._divergence.name == "jsd":
            parts = self._mixture_terms(self._log_p, self._log_q)
            return torch.stack([torch.where(self._held, part, 0.0).sum(1) for part in parts], 1)
        mass, cross = gathered[..., TOP_MASS], gathered[..., TOP_CROSS]
        tail_log_ratio = self._log_p_tail - self._log_q_tail
        if self._divergence.name == "reverse_kl":
            mass, cross = shift.exp() * mass, shift.exp() * (cross + shift * mass)
            top = (cross.sum(0) - log_sum * mass.sum(0)) / log_sum.exp()
            self._value = top + self._log_p_tail.exp() * tail_log_ratio
        else:
            top = (cross - shift * mass).sum(0) + log_sum * mass.sum(0)
            self._value = top - self._log_q_tail.exp() * tail_log_ratio
        return None

    def _mixture_terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Of each outcome: p sp(a), and its term of the value."""
        beta = self._divergence.beta
        softplus, softplus_of_minus = self._softplus_pair(log_p, log_q)
        from_student = log_p.exp() * (softplus + math.log1p(-beta))
        from_teacher = _times(log_q.exp(), softplus_of_minus + math.log(beta))
        return log_p.exp() * softplus, (beta - 1) * from_student - beta * from_teacher

    def _softplus_pair(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        log_odds = log_q - log_p + self._divergence.teacher_log_odds
        zero = torch.zeros_like(log_odds)
        return torch.logaddexp(log_odds, zero), torch.logaddexp(-log_odds, zero)

    def values(self, sums: Tensor | None) -> Tensor:
        if sums is not None:
            total, value = self._mixture_terms(self._log_p_tail, self._log_q_tail)
            self._softplus_mean, self._value = sums[:, 0] + total, sums[:, 1] + value
        return self._value

    def gradient(self, sums: Tensor | None, token_weight: Tensor) -> Tensor:
        if self._student.shape[1] == 0:
            return self._student
        weight = (token_weight.double() / self._divergence.temperature)[:, None]
        tail = self._outcome_gradient(self._log_p_tail[:, None], self._log_q_tail[:, None])
        share = (self._own_max_tail - self._max_tail).exp() / self._sum_tail
        self._student.mul_((tail * share[:, None] * weight).float())
        top = self._outcome_gradient(self._log_p, self._log_q) * weight
        top = torch.where(self._held, top, 0.0).float()
        return self._student.scatter_add_(1, self._columns, top)

    def _outcome_gradient(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """g of each outcome; arguments and result fp64 [C, outcomes]."""
        p = log_p.exp()
        if self._divergence.name == "reverse_kl":
            return p * (log_p - log_q - self._value[:, None])
        if self._divergence.name == "forward_kl":
            total = self._log_q.exp().sum(1) + self._log_q_tail.exp()
            return p * total[:, None] - log_q.exp()
        softplus, _ = self._softplus_pair(log_p, log_q)
        return (self._divergence.beta - 1) * p * (softplus - self._softplus_mean[:, None])


def _tail_statistics(x: Tensor, temperature: float, result: Tensor) -> None:
    """Leaves exp(x - maximum) in ``x``, 0 where the top tokens were."""
    if temperature != 1.0:
        x.mul_(1 / temperature)
    maximum = x.amax(1).clamp_min(EMPTY_MAX)  # a shard may hold top tokens alone
    x.sub_(maximum[:, None]).exp_()
    result[:, MAX_TAIL], result[:, SUM_TAIL] = maximum, x.sum(1)


def _times(probability: Tensor, factor: Tensor) -> Tensor:
    """0 where the probability is, even where the factor is infinite."""
    return torch.where(probability == 0, 0.0, probability * factor)
