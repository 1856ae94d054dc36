"""Skips what needs an NVIDIA GPU where there is none; otherwise one NCCL rank for the session."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.device]:
    """A world of one NCCL rank, with Megatron's state initialised."""
    from megatron_prefix.mcore.groups import initialize_megatron

    store = tmp_path_factory.mktemp("store") / "store"
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    initialize_megatron(1)
    yield torch.device("cuda", 0)
    dist.destroy_process_group()
