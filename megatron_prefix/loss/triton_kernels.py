"""The elementwise passes of a chunk for a GPU: one reads the logits, one turns them into gradients.

Legend: C positions, V this rank's real vocabulary rows; see ``divergence.py`` for the symbols.

The passes are bound by memory traffic, so raw logits stay in their buffers until the gradient and
exponentials are made again instead of being written: 8 bytes read a logit for the statistics, 8
read and 2 (bf16) or 4 written for the gradient. Under ``TRITON_INTERPRET=1`` they run on a CPU.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_prefix.loss.divergence import (
    MIXTURE_STATISTICS,
    GradientFactors,
    Merged,
    empty_statistics,
)
from megatron_prefix.loss.kernels import Kernels, Logits

_KINDS = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}
REVERSE = tl.constexpr(0)
FORWARD = tl.constexpr(1)
JSD = tl.constexpr(2)
# Lower than any logit, yet finite: it stands for lanes beyond the row and for no maximum so far.
LOWEST = tl.constexpr(-1e30)

_ROW_BLOCK = 4096
_GRADIENT_BLOCK = 2048


class TritonKernels(Kernels):
    def statistics(self, logits: Logits) -> Tensor:
        result = empty_statistics(logits.student)
        rows, columns = logits.student.shape
        if columns:
            _statistics_kernel[(rows,)](
                logits.student,
                logits.teacher,
                result,
                columns,
                1 / logits.divergence.temperature,
                KIND=_KINDS[logits.divergence.name],
                BLOCK=_block(columns, _ROW_BLOCK),
                num_warps=8,
            )
        return result

    def mixture(self, logits: Logits, merged: Merged) -> Tensor:
        rows, columns = logits.student.shape
        divergence = logits.divergence
        sums = logits.student.new_zeros((rows, MIXTURE_STATISTICS + 1), dtype=torch.float64)
        if columns:
            _mixture_kernel[(rows,)](
                logits.student,
                logits.teacher,
                sums,
                merged.own_max_s.float(),
                merged.own_max_t.float(),
                merged.offset.float(),
                columns,
                1 / divergence.temperature,
                math.log1p(-divergence.beta),
                math.log(divergence.beta),
                BLOCK=_block(columns, _ROW_BLOCK),
                num_warps=8,
            )
        total, from_student, from_teacher = sums.unbind(1)
        from_student = merged.scale_s * from_student * (divergence.beta - 1)
        value = from_student - merged.scale_t * from_teacher * divergence.beta
        return torch.stack((merged.scale_s * total, value), 1)

    def logit_gradient(self, logits: Logits, factors: GradientFactors) -> Tensor:
        student, dtype = logits.student, logits.gradient_dtype
        rows, columns = student.shape
        result = student if dtype == torch.float32 else torch.empty_like(student, dtype=dtype)
        if columns:
            block = _block(columns, _GRADIENT_BLOCK)
            _gradient_kernel[(rows, triton.cdiv(columns, block))](
                student,
                logits.teacher,
                result,
                factors.first,
                factors.second,
                factors.max_s,
                factors.max_t,
                factors.offset,
                columns,
                1 / logits.divergence.temperature,
                KIND=_KINDS[logits.divergence.name],
                BLOCK=block,
                num_warps=8,
            )
        return result


def _block(columns: int, most: int) -> int:
    return min(most, triton.next_power_of_2(columns))


@triton.jit
def _statistics_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    result: tl.tensor,
    columns: tl.tensor,
    inverse_temperature: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program a row. The maxima are found on the way: sums so far are shifted to a new one, as
    ``merge_statistics`` shifts a rank's."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    max_s = tl.full([], LOWEST, tl.float32)
    max_t = tl.full([], LOWEST, tl.float32)
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        at = row * columns + start + lanes
        x = tl.load(student + at, mask=inside, other=LOWEST) * inverse_temperature
        y = tl.load(teacher + at, mask=inside, other=LOWEST) * inverse_temperature
        new_s = tl.maximum(max_s, tl.max(x, 0))
        new_t = tl.maximum(max_t, tl.max(y, 0))
        drop_s, drop_t = max_s - new_s, max_t - new_t
        keep_s, keep_t = tl.exp(drop_s), tl.exp(drop_t)
        exp_s, exp_t = tl.exp(x - new_s), tl.exp(y - new_t)
        delta = tl.where(inside, (x - new_s) - (y - new_t), 0.0)
        if KIND == REVERSE:
            cross = keep_s * (cross + sum_s * (drop_s - drop_t)) + exp_s * delta
        if KIND == FORWARD:
            cross = keep_t * (cross - sum_t * (drop_s - drop_t)) - exp_t * delta
        sum_s = keep_s * sum_s + exp_s
        sum_t = keep_t * sum_t + exp_t
        max_s, max_t = new_s, new_t
    result += row * 5
    tl.store(result, max_s.to(tl.float64))
    tl.store(result + 1, tl.sum(sum_s.to(tl.float64), 0))
    tl.store(result + 2, max_t.to(tl.float64))
    tl.store(result + 3, tl.sum(sum_t.to(tl.float64), 0))
    tl.store(result + 4, tl.sum(cross.to(tl.float64), 0))


@triton.jit
def _softplus_pair(log_odds: tl.tensor) -> tl.tuple:
    """softplus(a) and softplus(-a), neither from the other: log1p(u), u = exp(-|a|), is the
    series of 2 atanh(s), s = u / (2 + u) <= 1/3, which keeps its digits near 0."""
    u = tl.exp(-tl.abs(log_odds))
    s = u / (u + 2.0)
    z = s * s
    p = z * (1.0 / 15) + 1.0 / 13
    p = p * z + 1.0 / 11
    p = p * z + 1.0 / 9
    p = p * z + 1.0 / 7
    p = p * z + 1.0 / 5
    p = p * z + 1.0 / 3
    common = (p * z + 1.0) * (s + s)
    return tl.maximum(log_odds, 0.0) + common, tl.maximum(-log_odds, 0.0) + common


@triton.jit
def _mixture_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    result: tl.tensor,
    max_s: tl.tensor,
    max_t: tl.tensor,
    offset: tl.tensor,
    columns: tl.tensor,
    inverse_temperature: tl.tensor,
    log_rest: tl.tensor,
    log_beta: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """A program a row: sums of e_s sp(a), e_s (sp(a) + ln(1-beta)), e_t (sp(-a) + ln(beta))."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    row_max_s, row_max_t = tl.load(max_s + row), tl.load(max_t + row)
    row_offset = tl.load(offset + row)
    total = tl.zeros([BLOCK], tl.float32)
    from_student = tl.zeros([BLOCK], tl.float32)
    from_teacher = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + lanes < columns
        at = row * columns + start + lanes
        x = tl.load(student + at, mask=inside, other=LOWEST) * inverse_temperature - row_max_s
        y = tl.load(teacher + at, mask=inside, other=LOWEST) * inverse_temperature - row_max_t
        log_odds = tl.where(inside, y - x, 0.0) + row_offset
        softplus, softplus_of_minus = _softplus_pair(log_odds)
        exp_s, exp_t = tl.exp(x), tl.exp(y)
        total += exp_s * softplus
        from_student += exp_s * (softplus + log_rest)
        from_teacher += exp_t * (softplus_of_minus + log_beta)
    result += row * 3
    tl.store(result, tl.sum(total.to(tl.float64), 0))
    tl.store(result + 1, tl.sum(from_student.to(tl.float64), 0))
    tl.store(result + 2, tl.sum(from_teacher.to(tl.float64), 0))


@triton.jit
def _gradient_kernel(
    student: tl.tensor,
    teacher: tl.tensor,
    result: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    max_s: tl.tensor,
    max_t: tl.tensor,
    offset: tl.tensor,
    columns: tl.tensor,
    inverse_temperature: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program a block of a row; ``result`` may be ``student``."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < columns
    at = row * columns + lanes
    x = tl.load(student + at, mask=inside, other=0.0) * inverse_temperature - tl.load(max_s + row)
    y = tl.load(teacher + at, mask=inside, other=0.0) * inverse_temperature - tl.load(max_t + row)
    row_first, row_second = tl.load(first + row), tl.load(second + row)
    if KIND == REVERSE:
        gradient = tl.exp(x) * (x - y + row_second) * row_first
    if KIND == FORWARD:
        gradient = tl.exp(x) * row_first - tl.exp(y) * row_second
    if KIND == JSD:
        softplus, _ = _softplus_pair(y - x + tl.load(offset + row))
        gradient = tl.exp(x) * (softplus + row_second) * row_first
    tl.store(result + at, gradient.to(result.dtype.element_ty), mask=inside)
