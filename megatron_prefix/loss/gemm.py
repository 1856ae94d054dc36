"""The four GEMMs of a chunk, with fp32 results whatever the inputs' dtype.

Legend: C positions of a chunk, V real vocabulary rows of this rank's shard, d hidden size.

bf16 logits put 4-34% of error on the gradient of the hidden states, the more the closer the
student is to the teacher, so the accumulator's fp32 must reach memory unrounded.
"""

import torch
from torch import Tensor

# CPU BLAS has no bf16 GEMM with an fp32 result: the weight is widened this many rows at a time.
_WIDENED_ROWS = 4096


def logits_into(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """``out[C, V] = hidden[C, d] @ weight[V, d].T`` in fp32."""
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.t(), out_dtype=torch.float32, out=out)
    else:
        wide_hidden = hidden.float()
        for rows in _blocks(weight.shape[0]):
            torch.mm(wide_hidden, weight[rows].float().t(), out=out[:, rows])


def hidden_gradient_into(out: Tensor, logit_gradient: Tensor, weight: Tensor) -> None:
    """``out[C, d] = logit_gradient[C, V] @ weight[V, d]``, rounded once, to ``out``'s dtype."""
    if weight.dtype == torch.float32:
        torch.mm(logit_gradient, weight, out=out)
    elif weight.is_cuda:
        out.copy_(torch.mm(logit_gradient.to(weight.dtype), weight, out_dtype=torch.float32))
    else:
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        for rows in _blocks(weight.shape[0]):
            total.addmm_(logit_gradient[:, rows], weight[rows].float())
        out.copy_(total)


def add_weight_gradient(total: Tensor, logit_gradient: Tensor, hidden: Tensor) -> None:
    """``total[V, d] += logit_gradient[C, V].T @ hidden[C, d]``; ``total`` is fp32."""
    if hidden.dtype == torch.float32:
        total.addmm_(logit_gradient.t(), hidden)
    elif hidden.is_cuda:
        narrow = logit_gradient.to(hidden.dtype).t()
        torch.addmm(total, narrow, hidden, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(logit_gradient.t(), hidden.float())


def _blocks(rows: int) -> list[slice]:
    return [slice(at, min(at + _WIDENED_ROWS, rows)) for at in range(0, rows, _WIDENED_ROWS)]
