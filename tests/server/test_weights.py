"""Weights on their way to a real server: what it serves afterwards, and the proof of it."""

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_prefix.rollout.checksum import (
    ServedLayout,
    WeightHasher,
    WeightsDiffer,
    verify,
)
from megatron_prefix.rollout.client import Endpoint, SglangClient
from megatron_prefix.rollout.meeting import listen, make_group
from megatron_prefix.rollout.protocol import RequestRefused, Sampling
from megatron_prefix.rollout.weights import (
    Bucket,
    WeightGroup,
    WeightSyncFailed,
    publish_from_disk,
)
from tests.server.faulty_peer import FaultyPeer, faulty_peer
from tests.tiny_models import write_tiny_qwen3

pytestmark = pytest.mark.usefixtures("original_weights")
LAYOUT = ServedLayout(device="cpu", dtype=torch.float32)
GREEDY = Sampling(12, temperature=0.0)
PROMPTS = [[5, 6, 7], [9] * 20]
Weights = dict[str, torch.Tensor]


@pytest.fixture
def group(client: SglangClient) -> Iterator[WeightGroup]:
    group = WeightGroup.join([client], backend="gloo", timeout_s=60.0)
    yield group
    group.close()


def scaled(weights: Weights, factor: float = -0.5) -> Weights:
    return {name: tensor * factor for name, tensor in weights.items()}


def in_buckets(weights: Weights, count: int) -> list[Bucket]:
    """By layer, so that what the server fuses comes in one bucket."""
    named = sorted(weights.items())
    size = -(-len(named) // count)
    return [named[start : start + size] for start in range(0, len(named), size)]


def hashes(weights: Weights) -> dict[int, dict[str, str]]:
    hasher = WeightHasher(LAYOUT)
    for name, tensor in weights.items():
        hasher.add(name, tensor)
    return hasher.checksums()


def test_the_hash_of_a_fresh_server_is_the_checkpoints(
    client: SglangClient, weights: Weights
) -> None:
    verify(client, hashes(weights))


@pytest.mark.parametrize("count", [1, 3, 24])
def test_a_sync_changes_what_is_sampled_and_the_checksum_agrees(
    client: SglangClient, group: WeightGroup, weights: Weights, versions: Iterator[int], count: int
) -> None:
    before = client.generate(PROMPTS, GREEDY)
    version, hasher = next(versions), WeightHasher(LAYOUT)
    group.publish(hasher.passing(in_buckets(scaled(weights), count)), version)
    after = client.generate(PROMPTS, GREEDY)
    verify(client, hasher.checksums())
    assert [g.token_ids for g in before] != [g.token_ids for g in after]
    assert {g.policy_version for g in after} == {version}
    assert client.model_info()["weight_version"] == f"v{version}"


def test_a_group_publishes_again_and_again(
    client: SglangClient, group: WeightGroup, weights: Weights, versions: Iterator[int]
) -> None:
    for factor in (0.9, 1.1, 0.7):
        changed = scaled(weights, factor)
        group.publish(in_buckets(changed, 2), next(versions))
        verify(client, hashes(changed))


def test_dtypes_may_differ_within_a_bucket_and_from_the_servers(
    client: SglangClient, group: WeightGroup, weights: Weights, versions: Iterator[int]
) -> None:
    mixed = scaled(weights)
    for name in list(mixed)[::2]:
        mixed[name] = mixed[name].to(torch.bfloat16)
    odd = "model.layers.0.self_attn.q_norm.weight"
    mixed[odd] = mixed[odd].to(torch.float64)
    group.publish([list(mixed.items())], next(versions))
    verify(client, hashes(mixed))


def test_a_transposed_view_is_published_as_its_values(
    client: SglangClient, group: WeightGroup, weights: Weights, versions: Iterator[int]
) -> None:
    changed = scaled(weights)
    views = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        for name, tensor in changed.items()
    }
    assert not views["model.embed_tokens.weight"].is_contiguous()
    group.publish([list(views.items())], next(versions))
    verify(client, hashes(changed))


def test_a_difference_names_its_tensor(client: SglangClient, weights: Weights) -> None:
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 1e-6
    weights["model.norm.weight"][0] += 1e-6
    with pytest.raises(WeightsDiffer) as caught:
        verify(client, hashes(weights))
    message = str(caught.value)
    assert message.startswith(client.url)
    assert "model.layers.1.mlp.gate_up_proj.weight (trainer" in message
    assert "model.norm.weight (trainer" in message
    assert message.count("(trainer") == 2


def test_a_tensor_that_was_not_published_is_named(client: SglangClient, weights: Weights) -> None:
    del weights["model.norm.weight"]
    with pytest.raises(WeightsDiffer, match=r"model.norm.weight \(trainer not published, server"):
        verify(client, hashes(weights))


def test_ranks_that_the_server_has_not(client: SglangClient, weights: Weights) -> None:
    with pytest.raises(WeightsDiffer, match=r"tensor-parallel ranks \[0\], not \[0, 1\]"):
        verify(client, {0: {}, 1: {}})


def test_the_disk_route(
    client: SglangClient, versions: Iterator[int], tmp_path: Path, weights: Weights
) -> None:
    folder = write_tiny_qwen3(tmp_path / "other", vocab_size=100, seed=1)
    changed = scaled(weights)
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    version = next(versions)
    publish_from_disk([client], folder, version)
    verify(client, hashes(changed))
    assert {g.policy_version for g in client.generate(PROMPTS, GREEDY)} == {version}


def test_a_folder_that_cannot_be_loaded_leaves_the_weights(
    client: SglangClient, versions: Iterator[int], tmp_path: Path, weights: Weights
) -> None:
    with pytest.raises(RequestRefused, match=r"/update_weights_from_disk refused"):
        publish_from_disk([client], tmp_path / "nothing", next(versions))
    verify(client, hashes(weights))


def test_an_update_that_a_dead_trainer_left_open_is_closed(
    client: SglangClient, group: WeightGroup, weights: Weights, versions: Iterator[int]
) -> None:
    client.begin_weight_update()
    group.publish([list(scaled(weights).items())], next(versions))
    verify(client, hashes(scaled(weights)))


def test_tensors_that_do_not_fit_are_refused_and_a_new_group_mends_it(
    client: SglangClient, group: WeightGroup, weights: Weights, versions: Iterator[int]
) -> None:
    wrong = {"model.norm.weight": torch.zeros(7)}
    with pytest.raises(WeightSyncFailed, match=r"could not receive weights: .*refused.* 400"):
        group.publish([list(wrong.items())], next(versions))
    with pytest.raises(WeightSyncFailed, match=r"failed before; join a new one"):
        group.publish([list(weights.items())], next(versions))
    fresh = WeightGroup.join([client], backend="gloo", timeout_s=60.0)
    fresh.publish([list(weights.items())], next(versions))
    fresh.close()
    verify(client, hashes(weights))


def test_a_server_that_refuses_a_broadcast_does_not_hang_the_trainer(
    client: SglangClient, group: WeightGroup, weights: Weights, versions: Iterator[int]
) -> None:
    """The server has left the group, so that nobody takes part in the broadcast."""
    client.leave_weight_group(group.name)
    started_at = time.monotonic()
    told = rf"could not receive weights: .*{group.name} not in \["
    with pytest.raises(WeightSyncFailed, match=told):
        group.publish([list(weights.items())], next(versions))
    assert time.monotonic() - started_at < 30.0, "it waited for the group's timeout of 60 s"


def test_a_server_that_refuses_to_join_is_heard_of_at_once() -> None:
    answers = [(200, '{"tp_size": 1}'), (400, '{"success": false, "message": "no gloo here"}')]
    started_at = time.monotonic()
    with (
        faulty_peer(answers) as peer,
        SglangClient(Endpoint(peer.url)) as client,
        pytest.raises(WeightSyncFailed, match=r"could not join the weight group: .*no gloo here"),
    ):
        WeightGroup.join([client], backend="gloo", timeout_s=60.0)
    assert time.monotonic() - started_at < 30.0, "it waited for the group's timeout of 60 s"


def test_a_server_that_says_it_joined_but_does_not_come() -> None:
    answers = [(200, '{"tp_size": 1}'), (200, '{"success": true, "message": ""}')]
    with (
        faulty_peer(answers) as peer,
        SglangClient(Endpoint(peer.url)) as client,
        pytest.raises(WeightSyncFailed, match="join the weight group"),
    ):
        WeightGroup.join([client], backend="gloo", timeout_s=1.0)


UPDATE = (
    "/begin_weight_update",
    "/update_weights_from_distributed",
    "/end_weight_update",
    "/destroy_weights_update_group",
)


def publish_to(*peers: FaultyPeer) -> WeightSyncFailed:
    """What becomes of an update to servers whose group has only the trainer for a member."""
    clients = [SglangClient(Endpoint(peer.url)) for peer in peers]
    store, _, _ = listen([peers[0].url], 1, 5.0)
    name = f"alone-{secrets.token_hex(4)}"  # torch takes no name twice
    group = make_group(store, name, 1, "gloo", 5.0)
    with pytest.raises(WeightSyncFailed) as caught:
        WeightGroup(clients, name, group, store, 0.5).publish([[("w", torch.zeros(3))]], 1)
    return caught.value


@pytest.mark.parametrize("stops_at", [0, 1, 2])
def test_a_server_that_stops_answering_is_named_and_told_nothing_more(stops_at: int) -> None:
    success = (200, '{"success": true}')
    with faulty_peer([success], delay_s=8.0) as silent, faulty_peer([success]) as well:
        silent.fixed = dict.fromkeys(UPDATE[:stops_at], success)
        started_at = time.monotonic()
        failed = publish_to(well, silent)
        assert time.monotonic() - started_at < 5.0, "a goodbye was waited for"
        assert list(failed.silent) == [silent.url] and failed.silent[silent.url] >= 0.5
        assert [path for path, _ in silent.requests] == list(UPDATE[: stops_at + 1])
        told = [path for path, _ in well.requests]
        assert told == [*UPDATE[: stops_at + 1], *UPDATE[2:]]


def test_where_no_server_answers_none_is_blamed() -> None:
    success = (200, '{"success": true}')
    with faulty_peer([success], delay_s=8.0) as one, faulty_peer([success], delay_s=8.0) as two:
        for peer in (one, two):
            peer.fixed = dict.fromkeys(UPDATE[2:], success)
        assert publish_to(one, two).silent == {}
        assert [path for path, _ in two.requests] == [UPDATE[0], *UPDATE[2:]]
