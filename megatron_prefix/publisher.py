"""Weights from the student's shards to the servers after each update, and the proof that they came.

Every rank takes part in gathering the buckets; rank 0 alone talks to the servers.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_prefix.config import RolloutConfig
from megatron_prefix.mcore.export import export_hf
from megatron_prefix.mcore.model import DTYPES, MegatronModel
from megatron_prefix.mcore.weights import hf_buckets
from megatron_prefix.rollout.checksum import ServedLayout, WeightHasher, verify
from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.weights import WeightGroup, publish_from_disk

logger = logging.getLogger(__name__)
Bucket = list[tuple[str, Tensor]]


class NoPublisher:
    """For replayed rollouts: nothing samples from the student."""

    def prepare(self) -> None:
        pass

    def publish(self, version: int) -> None:
        pass

    def cancel(self) -> None:
        pass


class ServerPublisher:
    """Streams buckets through a process group with the servers, or by way of a shared folder.

    ``clients`` and ``group`` are rank 0's; the other ranks give none and None.
    """

    def __init__(
        self,
        model: MegatronModel,
        rollout: RolloutConfig,
        clients: Sequence[SglangClient],
        group: WeightGroup | None,
        folder: Path,
    ) -> None:
        self._model, self._rollout, self._clients = model, rollout, clients
        self._group, self._folder = group, folder
        self._published = 0
        name = model_dtype(model) if rollout.dtype == "auto" else rollout.dtype
        self._dtype = DTYPES[name]

    def prepare(self) -> None:
        """Let the servers get ready while the step computes. Not collective."""
        if self._group is not None:
            self._group.open()

    def cancel(self) -> None:
        """Undo :meth:`prepare`: there is nothing new to publish. Not collective."""
        if self._group is not None:
            self._group.cancel()

    def publish(self, version: int) -> None:
        """Collective. Raises SglangError on rank 0 where a server did not take the weights, or
        holds others than the trainer."""
        every = self._rollout.verify_weights_every
        check = self._published == 0 or (every > 0 and self._published % every == 0)
        hasher = WeightHasher(self._served()) if check and self._clients else None
        if self._rollout.weight_sync == "disk":
            self._by_disk(version, hasher)
        else:
            self._by_group(version, hasher)
        self._published += 1
        if hasher is not None:
            for client in self._clients:
                verify(client, hasher.checksums())
            logger.info("servers hold the trainer's weights v%d: checksums agree", version)

    def _by_group(self, version: int, hasher: WeightHasher | None) -> None:
        buckets = self._buckets(hasher)
        if self._group is not None:
            self._group.publish(buckets, version)
        else:
            for _ in buckets:  # other ranks give their shards
                pass

    def _by_disk(self, version: int, hasher: WeightHasher | None) -> None:
        export_hf(self._model, self._folder, self._dtype)
        if self._clients:
            publish_from_disk(self._clients, self._folder, version)
        if hasher is not None or not self._clients:
            for _ in self._buckets(hasher):
                pass

    def _served(self) -> ServedLayout:
        """How the servers hold the model; they are all started alike."""
        info = self._clients[0].server_info()
        return ServedLayout(
            device=info["device"],
            dtype=self._dtype,
            tensor_model_parallel_size=info["tp_size"],
            num_key_value_heads=self._model.hf.shape.num_query_groups,
            num_experts=self._model.hf.shape.num_experts,
        )

    def _buckets(self, hasher: WeightHasher | None) -> Iterator[Bucket]:
        size = int(self._rollout.bucket_mib * 2**20)
        buckets = hf_buckets(self._model, size, self._dtype)
        return hasher.passing(buckets) if hasher is not None else buckets


def model_dtype(model: MegatronModel) -> str:
    """ "bf16" or "fp32", as recipes name it."""
    return next(name for name, dtype in DTYPES.items() if dtype == model.config.params_dtype)


def backend_for(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
