"""Which GPUs of a machine servers have, and which servers share one with the trainer."""

import socket
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.addresses import own_address

SHARED = -1  # rollout.first_gpu: behind the ranks' GPUs where there is room, else on theirs


def gpus_here() -> int:
    import torch  # late: most of what imports this module needs no torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def first_server_gpu(rollout: RolloutConfig, ranks: int, gpus: int) -> int:
    """Where the GPUs of server 0 begin on a machine whose first ``ranks`` GPUs have a rank each."""
    if rollout.first_gpu != SHARED:
        return rollout.first_gpu
    wanted = rollout.num_servers * rollout.server_tensor_parallel_size
    return ranks if ranks + wanted <= gpus else 0


def has_gpu(url: str, info: Mapping[str, Any], card: int) -> bool:
    """Whether a server, by its ``/server_info``, runs on GPU ``card`` of this machine."""
    if info["device"] != "cuda" or not _is_here(urlsplit(url).hostname or ""):
        return False
    first, step = int(info["base_gpu_id"]), int(info.get("gpu_id_step", 1))
    return card in range(first, first + step * int(info["tp_size"]), step)


def _is_here(host: str) -> bool:
    try:
        return own_address(host) == socket.gethostbyname(host)
    except OSError:
        return False
