"""What the loss refuses, before any collective is entered."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_settings(
    divergence: str, beta: float, temperature: float, chunk_size: int | None
) -> None:
    """Raises ValueError, with the value and what would do, for a setting without a meaning."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is unknown; use one of {DIVERGENCES}")
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"beta={beta} must lie between 0 and 1; use forward_kl or reverse_kl for the ends"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be positive and finite")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None to have it chosen")


def check_heads(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
) -> None:
    """Raises ValueError, with both numbers, where hidden states and LM-head shards do not fit."""
    _check_head("student", student_hidden, student_weight)
    _check_head("teacher", teacher_hidden, teacher_weight)
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
    devices = [t.device for t in (student_hidden, student_weight, teacher_hidden, teacher_weight)]
    if len(set(devices)) > 1:
        raise ValueError(f"hidden states and weights must share one device, not {devices}")


def _check_head(name: str, hidden: Tensor, weight: Tensor) -> None:
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


def check_tokens(positions: int, token_weight: Tensor, labels: Tensor | None) -> None:
    """Raises ValueError where the per-token inputs are not ``[positions]`` of their dtype."""
    if token_weight.shape != (positions,) or token_weight.dtype != torch.float32:
        raise ValueError(
            f"token_weight must be float32 [{positions}], "
            f"not {token_weight.dtype} {list(token_weight.shape)}"
        )
    if labels is not None and (labels.shape != (positions,) or labels.dtype != torch.int64):
        raise ValueError(
            f"labels must be int64 [{positions}], not {labels.dtype} {list(labels.shape)}"
        )


def check_vocabulary(vocab_size: int, rows: int, tp_group: ProcessGroup | None) -> None:
    """Raises ValueError where the shards of all ranks together cannot hold the vocabulary."""
    ranks = 1 if tp_group is None else tp_group.size()
    if not 0 < vocab_size <= rows * ranks:
        raise ValueError(
            f"vocab_size={vocab_size} must be positive and fit {ranks} shards of {rows} rows, "
            f"{rows * ranks} in all; pad the LM heads or mend vocab_size"
        )


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises ValueError with the first position of a NaN or an infinity in ``tensor``.

    It waits for the device, so it is for set-up and for finding out why a loss was not finite;
    the loss itself never calls it.
    """
    bad = torch.nonzero(~torch.isfinite(tensor.detach()))
    if bad.shape[0]:
        position = tuple(bad[0].tolist())
        raise ValueError(
            f"{name} {list(tensor.shape)} has {bad.shape[0]} non-finite values; "
            f"the first, {tensor[position].item()}, is at {list(position)}"
        )
