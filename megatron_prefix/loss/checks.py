"""What the loss refuses, before any collective is entered."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prefix.loss.divergence import Divergence

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "relaxed_kl")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_settings(divergence: Divergence, chunk_size: int | None) -> None:
    """Raises ValueError, with the value and what would do, for a setting without a meaning."""
    if divergence.name not in DIVERGENCES:
        raise ValueError(f"divergence={divergence.name!r} is unknown; use one of {DIVERGENCES}")
    if divergence.name == "jsd" and not 0 < divergence.beta < 1:
        raise ValueError(
            f"beta={divergence.beta} must lie between 0 and 1; use forward_kl or reverse_kl for "
            "the ends"
        )
    if divergence.name == "relaxed_kl" and not 0 < divergence.beta <= 0.5:
        raise ValueError(
            f"beta={divergence.beta}, relaxed_kl's share of the mixture, must lie above 0 and be "
            "at most 0.5; near 0 it is reverse_kl"
        )
    if not 0 < divergence.temperature < float("inf"):
        raise ValueError(f"temperature={divergence.temperature} must be positive and finite")
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise ValueError(
            f"chunk_size={chunk_size!r} must be a whole number from 1, or None to have it chosen"
        )


def check_given(tensors: Mapping[str, Tensor | None], may_be_none: Collection[str]) -> None:
    """Raises ValueError for what is no tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in may_be_none):
            raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")


def check_heads(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
) -> None:
    """Raises ValueError, with both numbers, where hidden states and LM-head shards do not fit."""
    check_head("student", student_hidden, student_weight)
    check_head("teacher", teacher_hidden, teacher_weight)
    if student_hidden.shape[0] != teacher_hidden.shape[0]:
        raise ValueError(
            f"student_hidden has {student_hidden.shape[0]} positions and teacher_hidden "
            f"{teacher_hidden.shape[0]}; both must hold the same prefix positions"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"student_weight has {student_weight.shape[0]} vocabulary rows and teacher_weight "
            f"{teacher_weight.shape[0]}; shard the teacher's LM head as the student's"
        )
    _check_devices(student_hidden, student_weight, teacher_hidden, teacher_weight)


def _check_devices(*tensors: Tensor) -> None:
    devices = [str(tensor.device) for tensor in tensors]
    if len(set(devices)) > 1:
        raise ValueError(f"the loss's tensors must share one device, not {', '.join(devices)}")


def check_top_k_divergence(divergence: Divergence) -> None:
    """Raises ValueError for one that needs both distributions whole."""
    if divergence.name == "relaxed_kl":
        raise ValueError(
            "divergence='relaxed_kl' needs a teacher that gives hidden states; with top-k tokens "
            "use reverse_kl"
        )


def check_top_k(hidden: Tensor, ids: Tensor, logprobs: Tensor, vocab_size: int) -> None:
    """Raises ValueError where a teacher's top tokens are no ``[N, k]`` for these hidden states."""
    positions, shape = hidden.shape[0], ids.shape
    if ids.dim() != 2 or shape[0] != positions or ids.dtype != torch.int64:
        raise ValueError(
            f"ids must be int64 [{positions}, k], one row a prefix position, "
            f"not {ids.dtype} {list(shape)}"
        )
    if logprobs.shape != shape or logprobs.dtype != torch.float32:
        raise ValueError(
            f"logprobs must be float32 {list(shape)} as ids are, "
            f"not {logprobs.dtype} {list(logprobs.shape)}"
        )
    if not 1 <= shape[1] < vocab_size:
        raise ValueError(
            f"the teacher gives k={shape[1]} tokens of a vocabulary of {vocab_size}; k must be "
            "at least 1 and leave a tail"
        )
    _check_devices(hidden, ids, logprobs)


def check_head(name: str, hidden: Tensor, weight: Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"{name}_hidden and {name}_weight must be matrices [N, d] and [V/tp, d], "
            f"not {list(hidden.shape)} and {list(weight.shape)}"
        )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name}_hidden has hidden size {hidden.shape[1]} and {name}_weight {weight.shape[1]}"
        )
    if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
        raise ValueError(
            f"{name}_hidden is {hidden.dtype} and {name}_weight {weight.dtype}; "
            "both must be one of float32, bfloat16, float16"
        )
    _check_devices(hidden, weight)


def check_main_grad(weight: Tensor, main_grad: Tensor | None) -> None:
    """Raises ValueError where the weight's gradient cannot be added to it."""
    if main_grad is None:
        return
    if main_grad.shape != weight.shape or main_grad.dtype not in _DTYPES:
        raise ValueError(
            f"student_weight's main_grad must be float32, or bfloat16 or float16, "
            f"{list(weight.shape)} as the weight is, not {main_grad.dtype} {list(main_grad.shape)}"
        )
    _check_devices(weight, main_grad)


def check_tokens(hidden: Tensor, token_weight: Tensor, labels: Tensor | None) -> None:
    """Raises ValueError where the per-token inputs are not ``[N]`` of their dtype."""
    positions = hidden.shape[0]
    if token_weight.shape != (positions,) or token_weight.dtype != torch.float32:
        raise ValueError(
            f"token_weight must be float32 [{positions}], "
            f"not {token_weight.dtype} {list(token_weight.shape)}"
        )
    if labels is not None and (labels.shape != (positions,) or labels.dtype != torch.int64):
        raise ValueError(
            f"labels must be int64 [{positions}], not {labels.dtype} {list(labels.shape)}"
        )
    _check_devices(hidden, token_weight, *([] if labels is None else [labels]))


def check_vocabulary(vocab_size: int, rows: int, tp_group: ProcessGroup | None) -> None:
    """Raises ValueError where the shards of all ranks together cannot hold the vocabulary."""
    ranks = 1 if tp_group is None else tp_group.size()
    if not (isinstance(vocab_size, int) and 0 < vocab_size <= rows * ranks):
        raise ValueError(
            f"vocab_size={vocab_size} must be whole, positive and fit {ranks} shards of {rows} "
            f"rows, {rows * ranks} in all; pad the LM heads or mend vocab_size"
        )


def check_top_k_values(ids: Tensor, logprobs: Tensor, vocab_size: int) -> None:
    """Raises ValueError, with the first position, for ids outside the vocabulary or twice in a
    row, and for log-probabilities that are above 0, NaN or sum to more than 1.

    It waits for the device, so it is for where targets come in; the loss itself never calls it.
    """
    ordered = ids.sort(1).values
    twice = torch.zeros_like(ids, dtype=torch.bool)
    twice[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    total = logprobs.double().exp().sum(1, keepdim=True)
    rules = (
        ((ids < 0) | (ids >= vocab_size), ids, f"is an id outside the vocabulary of {vocab_size}"),
        (twice, ordered, "is an id twice in a row"),
        (~(logprobs <= 0), logprobs, "is no log-probability"),
        (~(total <= 1 + 1e-3), total, "is more than a sum of probabilities"),
    )
    for bad, values, what in rules:
        if bad.any():
            position = tuple(torch.nonzero(bad)[0].tolist())
            value = values[position].item()
            raise ValueError(f"teacher targets: {value} {what}, at position {position[0]}")
