"""Ranks of a trainer send weights to a real server by way of a folder."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from megatron_prefix.config import ModelConfig, RolloutConfig
from megatron_prefix.mcore.cpu import adapt_to_cpu
from megatron_prefix.rollout.client import Endpoint, SglangClient
from megatron_prefix.rollout.fleet import Fleet
from megatron_prefix.rollout.protocol import Sampling
from megatron_prefix.rollout.server import Server
from tests.distributed.ranks import run_ranks
from tests.server.conftest import VOCABULARY
from tests.tiny_models import write_tiny_qwen3

adapt_to_cpu()

import torch.distributed as dist  # noqa: E402

from megatron_prefix import publisher  # noqa: E402
from megatron_prefix.mcore import export, weights  # noqa: E402
from megatron_prefix.mcore.groups import initialize_megatron  # noqa: E402
from tests.distributed.world import CPU, build, model_config  # noqa: E402

BUCKET_BYTES = 1 << 14


def synced(
    config: ModelConfig,
    rollout: RolloutConfig,
    endpoint: Endpoint,
    folder: Path,
    versions: tuple[int, int],
) -> tuple[int, int, int]:
    """Two syncs: buckets that the model makes, buckets that were gathered, and proofs."""
    initialize_megatron(1)
    model = build(config, 2, owner="student")
    fleet = Fleet([endpoint], rollout) if dist.get_rank() == 0 else None
    sender = publisher.ServerPublisher(model, rollout, fleet, CPU, folder)
    with (
        patch.object(export, "SHARD_BYTES", BUCKET_BYTES),
        patch.object(weights, "_gather_bucket", wraps=weights._gather_bucket) as gather,
        patch.object(publisher, "verify", wraps=publisher.verify) as verify,
    ):
        for version in versions:
            sender.publish(version)
    if fleet is not None:
        assert [member.version for member in fleet.members] == [versions[-1]]
        fleet.close()
    made = len(list(weights.hf_buckets(model, BUCKET_BYTES, torch.float32)))
    return made, gather.call_count, verify.call_count


@pytest.mark.usefixtures("original_weights")
def test_each_sync_gathers_the_model_once(
    server: Server,
    client: SglangClient,
    rollout: RolloutConfig,
    versions: Iterator[int],
    tmp_path: Path,
) -> None:
    """The first sync is proved by checksums, the second is not."""
    student = write_tiny_qwen3(tmp_path / "student", vocab_size=VOCABULARY, seed=1)
    by_disk = replace(rollout, weight_sync="disk", verify_weights_every=0)
    before = client.generate([[5, 6, 7]], Sampling(12, temperature=0.0))
    config, given = model_config(student, tp=2), (next(versions), next(versions))
    ranks = run_ranks(2, synced, config, by_disk, server.endpoint, tmp_path / "out", given)
    after = client.generate([[5, 6, 7]], Sampling(12, temperature=0.0))
    for rank, (made, gathered, proofs) in enumerate(ranks):
        assert made > 4
        assert gathered == 2 * made
        assert proofs == (1 if rank == 0 else 0)
    assert after[0].policy_version == given[-1]
    assert after[0].token_ids != before[0].token_ids
