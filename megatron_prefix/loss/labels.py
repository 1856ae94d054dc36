"""The student's log-probabilities of given tokens, on the way past its logits.

Legend: C positions, V this rank's real vocabulary rows, R tensor-parallel ranks.

They are at temperature 1, whatever the divergence's: a rollout's server reports them so.
"""

import torch
from torch import Tensor

from megatron_prefix.loss.divergence import MAX_S, SUM_S
from megatron_prefix.loss.torch_kernels import row_blocks

# exp of it is 0 in fp32 and in fp64, and it times 0 is 0, which minus infinity's would not be.
_NOT_THE_LABEL = -1e4


def label_columns(logits: Tensor, labels: Tensor, first_row: int, temperature: float) -> Tensor:
    """This rank's share, to be gathered behind the statistics: fp64 [C, 1] or [C, 2].

    ``logits`` fp32 [C, V] raw, ``labels`` int64 [C] over the whole vocabulary. Column 0: the
    label's logit where this shard holds it, else 0. Column 1, off temperature 1 alone:
    sum exp(z - max z).
    """
    columns = logits.new_zeros((logits.shape[0], 1 if temperature == 1 else 2), dtype=torch.float64)
    if logits.shape[1] == 0:
        return columns
    own = labels - first_row
    held = (own >= 0) & (own < logits.shape[1])
    picked = logits.gather(1, own.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    columns[:, 0] = torch.where(held, picked, 0.0)
    if temperature != 1:
        for rows in row_blocks(logits):
            block = logits[rows]
            columns[rows, 1] = (block - block.amax(1, keepdim=True)).exp_().sum(1).double()
    return columns


def label_logprobs(gathered: Tensor, labels: Tensor, vocab_size: int, temperature: float) -> Tensor:
    """fp32 [C] from the gathered statistics with the label columns behind them, fp64 [R, C, >=6];
    NaN for a label outside the vocabulary."""
    maxima = gathered[..., MAX_S] * temperature
    logits, sums = gathered[..., -1], gathered[..., SUM_S]
    if temperature != 1:
        logits, sums = gathered[..., -2], gathered[..., -1]
    top = maxima.amax(0)
    total = ((maxima - top).exp() * sums).sum(0)
    logprobs = logits.sum(0) - top - total.log()
    inside = (labels >= 0) & (labels < vocab_size)
    return torch.where(inside, logprobs, torch.nan).float()


def one_hot_logits(out: Tensor, labels: Tensor, first_row: int, vocab_size: int) -> None:
    """Fills ``out`` fp32 [C, V] with this shard's logits of a teacher that is sure of the labels.

    Its softmax over all shards is exactly 1 at the label and 0 elsewhere. ``labels`` int64 [C];
    NaN for one outside the vocabulary.
    """
    inside = (labels >= 0) & (labels < vocab_size)
    out.copy_(torch.where(inside, _NOT_THE_LABEL, torch.nan)[:, None].expand_as(out))
    own = labels - first_row
    held = inside & (own >= 0) & (own < out.shape[1])
    if out.shape[1]:
        column = own.clamp(0, out.shape[1] - 1)[:, None]
        out.scatter_(1, column, torch.where(held[:, None], 0.0, out.gather(1, column)))
