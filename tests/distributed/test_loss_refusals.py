"""Calls that do not fit are refused on all ranks, in the same words, and nobody hangs."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.loss import prefix_cross_entropy, prefix_divergence, top_k_divergence
from tests.distributed.ranks import run_ranks
from tests.unit.loss.reference import Case, make_case

ROWS = 102  # of each of two ranks


def _own_shard(**changes: Tensor) -> Case:
    case = make_case(rows=2 * ROWS)
    rank = dist.get_rank()
    shards = {
        name: getattr(case, name).chunk(2)[rank] for name in ("student_weight", "teacher_weight")
    }
    return replace(case, **{**shards, **changes})


def _call(case: Case, **settings: object) -> Tensor:
    arguments = {"vocab_size": 199, "tp_group": dist.group.WORLD, **settings}
    return prefix_divergence(*case.inputs, **arguments).kl


def _top_k(k: int) -> Tensor:
    case = _own_shard()
    ids = torch.arange(k).expand(37, k)
    heads = *case.inputs[:2], ids, torch.full((37, k), -9.0), case.token_weight
    return top_k_divergence(*heads, vocab_size=199, tp_group=dist.group.WORLD).kl


def _shorter(rank: int) -> Tensor:
    case = make_case(n=37 - rank, rows=2 * ROWS)
    shards = {name: getattr(_own_shard(), name) for name in ("student_weight", "teacher_weight")}
    return _call(replace(case, **shards))


def _changed(field: str, tensor: Tensor, rank: int) -> Tensor:
    return _call(_own_shard(**({field: tensor} if rank == 1 else {})))


def _given(field: str, what: object) -> Callable[[int], Tensor]:
    """A call to which rank 1 is given ``what``."""
    return partial(_changed, field, what)  # type: ignore[arg-type]


def _setting(name: str, values: tuple[object, object], rank: int) -> Tensor:
    return _call(_own_shard(), **{name: values[rank]})


def _frozen(rank: int) -> Tensor:
    return _call(_own_shard(student_hidden=make_case().student_hidden.requires_grad_(rank == 0)))


def _main_grad(mine: Tensor | None, rank: int) -> Tensor:
    """Rank 1 has ``mine``."""
    weight = _own_shard().student_weight.requires_grad_()
    weight.main_grad = mine if rank else torch.zeros(ROWS, 24)
    return _call(_own_shard(student_weight=weight))


def _one_hot(rank: int) -> Tensor:
    case = _own_shard()
    labels = None if rank else torch.zeros(37, dtype=torch.int64)
    given = *case.inputs[:2], labels, case.token_weight
    return prefix_cross_entropy(*given, vocab_size=199, tp_group=dist.group.WORLD).kl


OTHER_RANK = "tensor-parallel rank 1: "
CASES: dict[str, tuple[Callable[[int], Tensor], list[str]]] = {
    "positions": (_shorter, ["student_hidden is torch.float32 [37, 24]", "[36, 24] on rank 1"]),
    "no position": (
        lambda rank: _call(replace(make_case(n=37 * rank), **_weights())),
        ["[0, 24]", "[37, 24] on rank 1"],
    ),
    "hidden size": (
        partial(_changed, "student_hidden", torch.zeros(37, 25)),
        [OTHER_RANK, "hidden size 25", "24"],
    ),
    "sharding": (
        partial(_changed, "teacher_weight", torch.zeros(2 * ROWS, 40)),
        [OTHER_RANK, "102 vocabulary rows", "204"],
    ),
    "dtype": (
        partial(_changed, "student_weight", torch.zeros(ROWS, 24).bfloat16()),
        [OTHER_RANK, "float32", "bfloat16"],
    ),
    "teacher's hidden size": (
        lambda rank: _call(_own_shard(**_narrow_teacher(rank))),
        ["teacher_hidden is torch.float32 [37, 40]", "[37, 39] on rank 1"],
    ),
    "vocabulary": (
        partial(_setting, "vocab_size", (199, 203)),
        ["vocab_size is 199", "203 on rank 1"],
    ),
    "vocabulary too large on one rank": (
        partial(_setting, "vocab_size", (199, 205)),
        [OTHER_RANK, "vocab_size=205", "204 in all"],
    ),
    "temperature": (
        partial(_setting, "temperature", (1.0, 2.0)),
        ["divergence is", "temperature=1.0", "temperature=2.0"],
    ),
    "chunks": (partial(_setting, "chunk_size", (8, None)), ["chunk_size is 8", "None on rank 1"]),
    "labels": (
        partial(_setting, "labels", (None, torch.zeros(37, dtype=torch.int64))),
        ["labels is none", "int64 [37] on rank 1"],
    ),
    "frozen": (_frozen, ["a gradient to student_hidden is True", "False on rank 1"]),
    "top k": (lambda rank: _top_k(4 + rank), ["teacher_ids is torch.int64 [37, 4]", "[37, 5]"]),
    "kind of teacher": (
        lambda rank: _top_k(4) if rank else _call(_own_shard()),
        ["teacher_hidden is torch.float32 [37, 40]", "nothing on rank 1"],
    ),
    "main_grad's shape": (
        partial(_main_grad, torch.zeros(ROWS, 25)),
        [OTHER_RANK, "main_grad", "[102, 24] as the weight is", "torch.float32 [102, 25]"],
    ),
    "main_grad's dtype": (
        partial(_main_grad, torch.zeros(ROWS, 24, dtype=torch.int32)),
        [OTHER_RANK, "main_grad", "torch.int32 [102, 24]"],
    ),
    "main_grad's other dtype": (
        partial(_main_grad, torch.zeros(ROWS, 24).bfloat16()),
        ["main_grad is torch.float32 [102, 24]", "bfloat16 [102, 24] on rank 1"],
    ),
    "main_grad's device": (
        partial(_main_grad, torch.zeros(ROWS, 24, device="meta")),
        [OTHER_RANK, "share one device, not cpu, meta"],
    ),
    "main_grad on one rank": (
        partial(_main_grad, None),
        ["main_grad is torch.float32 [102, 24]", "none on rank 1"],
    ),
    "main_grad is no tensor": (
        partial(_main_grad, [0.0]),  # type: ignore[arg-type]
        [OTHER_RANK, "AttributeError: 'list' object has no attribute 'shape'"],
    ),
    "no student": (_given("student_hidden", None), [OTHER_RANK, "student_hidden", "NoneType"]),
    "no head": (_given("student_weight", None), [OTHER_RANK, "student_weight", "NoneType"]),
    "no teacher": (_given("teacher_hidden", None), [OTHER_RANK, "teacher_hidden", "NoneType"]),
    "no token weights": (_given("token_weight", None), [OTHER_RANK, "token_weight", "NoneType"]),
    "an array": (
        _given("teacher_weight", np.zeros((ROWS, 40))),
        [OTHER_RANK, "teacher_weight must be a tensor, not ndarray"],
    ),
    "no label": (_one_hot, [OTHER_RANK, "teacher_labels must be a tensor, not NoneType"]),
    "another device": (
        _given("student_hidden", torch.zeros(37, 24, device="meta")),
        [OTHER_RANK, "share one device, not meta, cpu"],
    ),
    "a text for a number": (
        partial(_setting, "temperature", (1.0, "1.0")),
        [OTHER_RANK, "TypeError: '<' not supported"],
    ),
    "half a position": (
        partial(_setting, "chunk_size", (8, 8.5)),
        [OTHER_RANK, "chunk_size=8.5", "whole number"],
    ),
}


def _weights() -> dict[str, Tensor]:
    case = _own_shard()
    return {"student_weight": case.student_weight, "teacher_weight": case.teacher_weight}


def _narrow_teacher(rank: int) -> dict[str, Tensor]:
    width = 40 - rank
    return {"teacher_hidden": torch.zeros(37, width), "teacher_weight": torch.zeros(ROWS, width)}


def _all_refusals() -> dict[str, str]:
    """What each case told this rank; between them a good call, which must still go through."""
    told = {}
    for name, (call, _) in CASES.items():
        try:
            call(dist.get_rank())
            told[name] = "accepted"
        except ValueError as error:
            told[name] = str(error)
        assert _call(_own_shard()).isfinite().all(), name
    return told


@pytest.fixture(scope="module")
def told() -> list[dict[str, str]]:
    return run_ranks(2, _all_refusals, timeout_s=60)


@pytest.mark.parametrize("name", CASES)
def test_refused_on_both_ranks_in_the_same_words(name: str, told: list[dict[str, str]]) -> None:
    message, parts = told[0][name], CASES[name][1]
    assert told[1][name] == message and "\n" not in message
    assert all(part in message for part in parts), message
