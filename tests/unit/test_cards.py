"""Which GPUs servers have beside the ranks', and which servers share one with rank 0."""

import pytest

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.addresses import own_address
from megatron_prefix.rollout.cards import first_server_gpu, has_gpu

TWO_OF_TWO = RolloutConfig(num_servers=2, server_tensor_parallel_size=2)


@pytest.mark.parametrize(("ranks", "gpus", "first"), [(4, 8, 4), (5, 8, 0), (8, 8, 0), (1, 0, 0)])
def test_servers_come_behind_the_ranks_where_there_is_room(
    ranks: int, gpus: int, first: int
) -> None:
    assert first_server_gpu(TWO_OF_TWO, ranks, gpus) == first


def test_a_recipe_may_say_where() -> None:
    assert first_server_gpu(RolloutConfig(first_gpu=3), 8, 8) == 3
    assert first_server_gpu(RolloutConfig(first_gpu=0), 1, 8) == 0


@pytest.mark.parametrize(
    ("first", "step", "card", "shared"),
    [(0, 1, 0, True), (2, 1, 3, True), (2, 1, 4, False), (1, 1, 0, False), (0, 2, 1, False)],
)
def test_a_server_on_this_machine_shares_the_gpus_that_it_names(
    first: int, step: int, card: int, shared: bool
) -> None:
    info = {"device": "cuda", "base_gpu_id": first, "gpu_id_step": step, "tp_size": 2}
    assert has_gpu("http://127.0.0.1:30000", info, card) is shared


def test_servers_elsewhere_and_on_cpus_share_none() -> None:
    info = {"device": "cuda", "base_gpu_id": 0, "tp_size": 8}
    assert not has_gpu("http://192.0.2.7:30000", info, 0), "an address of documentation's"
    assert not has_gpu("http://127.0.0.1:30000", {**info, "device": "cpu"}, 0)
    assert not has_gpu("http://no-such-host.invalid:30000", info, 0)
    assert has_gpu(f"http://{own_address('127.0.0.1')}:30000", info, 0)
