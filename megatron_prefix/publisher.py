"""Weights from the student's shards to the servers after each update, and the proof that they came.

Every rank takes part in gathering the buckets; rank 0 alone talks to the servers.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_prefix.config import RolloutConfig
from megatron_prefix.mcore.export import exported_buckets
from megatron_prefix.mcore.hf_map import HfModel
from megatron_prefix.mcore.model import DTYPES, MegatronModel
from megatron_prefix.mcore.weights import WeightGatherer
from megatron_prefix.rollout.cards import has_gpu
from megatron_prefix.rollout.checksum import (
    ServedLayout,
    WeightHasher,
    WeightsDiffer,
    is_compared,
    verify,
)
from megatron_prefix.rollout.client import Endpoint, SglangClient
from megatron_prefix.rollout.fleet import NOBODY, UNKNOWN, Fleet, Member
from megatron_prefix.rollout.protocol import RequestRefused, SglangError
from megatron_prefix.rollout.weights import WeightGroup, WeightSyncFailed, publish_from_disk

logger = logging.getLogger(__name__)
Bucket = list[tuple[str, Tensor]]


class Publisher(Protocol):
    """Brings the student's weights to whatever samples from them."""

    def prepare(self) -> None:
        """No rollout is wanted until the next ``publish`` or ``cancel``. Not collective."""

    def cancel(self) -> None:
        """Nothing will be published after all. Not collective."""

    def publish(self, version: int) -> None:
        """Collective over the world; returns when the servers hold ``version``."""


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

    ``fleet`` is rank 0's; the other ranks give None. Servers that fail to take the weights are the
    fleet's to judge: the trainer sends them again before the next rollout.
    """

    def __init__(
        self,
        model: MegatronModel,
        rollout: RolloutConfig,
        fleet: Fleet | None,
        device: torch.device,
        folder: Path,
    ) -> None:
        self._model, self._rollout, self._fleet = model, rollout, fleet
        self._device, self._folder = device, folder
        self._gatherer = WeightGatherer(model)
        self._group: WeightGroup | None = None
        self._joined: list[Endpoint] = []
        self._published = 0
        name = model_dtype(model) if rollout.dtype == "auto" else rollout.dtype
        self._dtype = DTYPES[name]

    def prepare(self) -> None:
        """Let the servers get ready while the step computes. Not collective."""
        if self._group is not None and self._fleet and self._joined == _endpoints(self._fleet):
            self._group.open()

    def cancel(self) -> None:
        """Undo :meth:`prepare`: there is nothing new to publish. Not collective."""
        if self._group is not None:
            with self._judged():
                self._group.cancel()

    def close(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def publish(self, version: int) -> None:
        """Collective. On rank 0, servers that did not take the weights, or hold others than the
        trainer, are lost or doubted; raises SglangError where no server ever took any."""
        buckets = self._buckets()
        if self._fleet is not None and self._fleet.members:
            with self._judged():
                self._to_all(self._fleet, version, buckets)
        for _ in buckets:  # all ranks give their shards, whatever became of the servers
            pass

    def _buckets(self) -> Iterator[Bucket]:
        """The weights on their way to the servers: the shared folder is whole after the last."""
        if self._rollout.weight_sync == "disk":
            # Servers read it now; after a power failure it is written anew.
            return exported_buckets(self._model, self._folder, self._dtype, durable=False)
        return self._gatherer.buckets(int(self._rollout.bucket_mib * 2**20), self._dtype)

    def _to_all(self, fleet: Fleet, version: int, buckets: Iterator[Bucket]) -> None:
        members = fleet.members
        hasher = self._hasher(members[0].client) if self._proof_due(members) else None
        passing = hasher.passing(buckets) if hasher is not None else buckets
        clients = [member.client for member in members]
        if self._rollout.weight_sync == "disk":
            for _ in passing:
                pass
            publish_from_disk(clients, self._folder, version)
        else:
            self._join(fleet).publish(passing, version)
        if hasher is not None:
            for client in clients:
                verify(client, hasher.checksums(), timeout_s=self._rollout.sync_timeout_s)
            logger.info("servers hold the trainer's weights v%d: checksums agree", version)
        self._published += 1
        fleet.took(members, version)

    def _proof_due(self, members: Sequence[Member]) -> bool:
        """Whether checksums are compared after this publication."""
        every = self._rollout.verify_weights_every
        due = self._published == 0 or (every > 0 and self._published % every == 0)
        return due or any(member.version == UNKNOWN for member in members)

    def _join(self, fleet: Fleet) -> WeightGroup:
        """The group of the servers that are there now."""
        if self._group is not None and self._joined != _endpoints(fleet):
            self.close()
        if self._group is None:
            clients = [member.client for member in fleet.members]
            self._group = WeightGroup.join(
                clients, backend=self._backend(clients), timeout_s=self._rollout.sync_timeout_s
            )
            self._joined = _endpoints(fleet)
        return self._group

    def _backend(self, clients: Sequence[SglangClient]) -> str:
        """Of a group with ``clients``. NCCL refuses two members on one GPU, so weights go to a
        server that shares this rank's through host memory."""
        if self._rollout.weight_backend != "auto":
            return self._rollout.weight_backend
        if self._device.type != "cuda":
            return "gloo"
        timeout_s = self._rollout.sync_timeout_s
        for client in clients:
            info = client.server_info(timeout_s=timeout_s)
            if has_gpu(client.url, info, self._device.index or 0):
                logger.info("%s shares rank 0's GPU: weights go over gloo", client.url)
                return "gloo"
        return "nccl"

    @contextlib.contextmanager
    def _judged(self) -> Iterator[None]:
        """Errors of servers are the fleet's to judge, unless none ever took weights: then their
        refusal has a cause that sending again does not mend."""
        assert self._fleet is not None
        try:
            yield
        except SglangError as error:
            refused = isinstance(error, RequestRefused | WeightsDiffer)
            refused = refused or isinstance(error.__cause__, RequestRefused)
            if self._published == 0 and refused:
                raise
            logger.warning("weights did not reach every server: %s", error)
            self.close()
            silent = error.silent if isinstance(error, WeightSyncFailed) else NOBODY
            self._fleet.doubt(error, silent)

    def _hasher(self, client: SglangClient) -> WeightHasher | None:
        """None, with a warning, for a model whose tensors the servers hold rearranged; all servers
        are started alike."""
        info = client.server_info(timeout_s=self._rollout.sync_timeout_s)
        family = self._model.hf.config["architectures"][0]
        if is_compared(family, info["device"]):
            return WeightHasher(served_layout(self._model.hf, self._dtype, info))
        if self._published == 0:
            logger.warning(
                "that servers hold the trainer's weights is not proved: "
                "SGLang on %s rearranges a %s",
                info["device"],
                family,
            )
        return None


def served_layout(hf: HfModel, dtype: torch.dtype, info: dict[str, Any]) -> ServedLayout:
    """How a server whose ``/server_info`` is ``info`` holds a model in ``dtype``."""
    return ServedLayout(
        device=info["device"],
        dtype=dtype,
        tensor_model_parallel_size=info["tp_size"],
        num_key_value_heads=hf.shape.num_query_groups,
        num_experts=hf.shape.num_experts,
        num_shared_experts=hf.config.get("n_shared_experts") or 0,
        latent_attention=hf.latent_attention,
        query_latent=bool(hf.config.get("q_lora_rank")),
    )


def _endpoints(fleet: Fleet) -> list[Endpoint]:
    """Who is there: a server that was started again is another one."""
    return [member.endpoint for member in fleet.members]


def model_dtype(model: MegatronModel) -> str:
    """ "bf16" or "fp32", as recipes name it."""
    return next(name for name, dtype in DTYPES.items() if dtype == model.config.params_dtype)
