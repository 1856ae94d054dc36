"""Offloaded weights: device memory given back, and the same bits fetched beside other work."""

import pytest
import torch
from torch import nn

from megatron_prefix.mcore.offload import HostWeights

pytestmark = pytest.mark.gpu


def test_device_memory_is_given_back_and_the_bits_come_again(one_rank: torch.device) -> None:
    module = nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4096, 1024).to(torch.bfloat16))
    module.requires_grad_(False).to(one_rank)
    before = [p.clone() for p in module.parameters()]
    held = torch.cuda.memory_allocated(one_rank)
    host = HostWeights(module)
    assert torch.cuda.memory_allocated(one_rank) <= held - host.nbytes
    busy = torch.randn(4096, 4096, device=one_rank)
    for _ in range(3):
        torch.full((host.nbytes,), 7, dtype=torch.uint8, device=one_rank)  # whoever has it between
        host.fetch()
        for _ in range(20):
            busy = torch.mm(busy, busy).clamp_(-1, 1)
        with host.here():
            assert all(map(torch.equal, module.parameters(), before))
        assert torch.cuda.memory_allocated(one_rank) <= held - host.nbytes + busy.nbytes * 2
