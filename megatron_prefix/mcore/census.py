"""Counts what a rank of a run allocates, on the very modules: built on the meta device, which
gives shapes and no memory, in a world of torch's fake backend, where one process stands for any
rank of any number.

Modules are those for machines without a GPU; Transformer Engine's hold the same parameters under
other names.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prefix.config import Fp8Config, ModelConfig, OptimizerConfig
from megatron_prefix.layout import Layout
from megatron_prefix.types import Held

MOMENTS = 2  # of Adam, fp32 each, made in the first step


@dataclass(frozen=True)
class Question:
    """One rank of a model. ``optimizer`` None: a teacher, whose trunk goes forward alone."""

    config: ModelConfig
    hf_config: dict[str, Any]
    layout: Layout
    world_size: int
    rank: int
    optimizer: OptimizerConfig | None


def take_census(questions: Iterable[Question]) -> list[Held]:
    """One answer a question. Needs a process of its own: it patches torch for Megatron-Core, and
    starts and ends the default process group."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from megatron_prefix.mcore.cpu import adapt_to_cpu, put_on_meta

    adapt_to_cpu()
    put_on_meta()
    return [_answer(question) for question in questions]


def _answer(question: Question) -> Held:
    from megatron_prefix.mcore.groups import build_groups
    from megatron_prefix.mcore.hf_map import hf_model
    from megatron_prefix.mcore.model import build_model
    from megatron_prefix.mcore.optimizer import make_trainable

    owner = "student" if question.optimizer else "teacher"
    with _fake_world(question.world_size, question.rank):
        groups = build_groups(question.layout)
        hf = hf_model(question.config.hf_path, question.hf_config)
        # FP8 changes no parameter, and needs a GPU to be built.
        config = replace(question.config, fp8=Fp8Config())
        with torch.device("meta"):
            model = build_model(config, hf, groups, owner=owner, with_head=owner == "student")
        if question.optimizer is None:
            parameters = list(model.module.parameters())
            return Held(_elements(parameters), _bytes(parameters))
        student = make_trainable(model, question.optimizer, total_steps=1)
        sharded = question.optimizer.use_distributed_optimizer
        return count_student(student.ddp, student.optimizer, sharded=sharded)


@contextmanager
def _fake_world(world_size: int, rank: int) -> Iterator[None]:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def count_student(ddp: Any, optimizer: Any, *, sharded: bool) -> Held:
    """What Megatron's DDP and optimizer hold, built on memory or on meta alike; ``sharded``: over
    the ranks that hold the same parameters."""
    parameters = list(ddp.parameters())
    buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    own = _storages(parameters)
    copies = {key: size for key, size in _storages(masters).items() if key not in own}
    return Held(
        parameters=_elements(parameters),
        weights=sum(own.values()),
        gradients=_bytes([buffer.grad_data for buffer in buffers]),
        optimizer=sum(copies.values()) + MOMENTS * 4 * _elements(masters),
        dense_shards=_shards(ddp.buffers) if sharded else (),
        expert_shards=_shards(ddp.expert_parallel_buffers) if sharded else (),
    )


def _shards(buffers: Iterable[Any]) -> tuple[int, ...]:
    """Bytes of the distributed optimizer on each of the ranks that share ``buffers``.

    Megatron cuts each bucket, padding and all, into as many equal parts as there are ranks; state
    is made for the parameters' elements in them, and a copy of those that are not fp32.
    """
    shards: list[int] = []
    for buffer in buffers:
        ranks = buffer.data_parallel_group.size()
        shards = shards or [0] * ranks
        for parameter, (start, end, index) in buffer.param_index_map.items():
            bucket = buffer.buckets[index]
            size = bucket.grad_data.numel() // ranks
            width = 4 * MOMENTS + (0 if parameter.dtype == torch.float32 else 4)
            for rank in range(ranks):
                first = bucket.offset + rank * size
                shards[rank] += width * max(0, min(end, first + size) - max(start, first))
    return tuple(shards)


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(_storages(tensors).values())


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes of the memory behind tensors, each once: parameters are views of DDP's buffers."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
