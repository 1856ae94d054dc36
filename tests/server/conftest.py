"""One real SGLang server for the whole session, on a random Qwen3 of 70 thousand parameters."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.server import Server, server_pool
from megatron_prefix.rollout.weights import publish_from_disk
from tests.tiny_models import write_tiny_qwen3

VOCABULARY = 100  # no multiple of 64: the server pads it
RUNNING = 8  # requests at a time; the others wait in the server's queue


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    return write_tiny_qwen3(folder, vocab_size=VOCABULARY, max_position_embeddings=2048)


@pytest.fixture(scope="session")
def rollout() -> RolloutConfig:
    return RolloutConfig(device="cpu", server_args=("--max-running-requests", str(RUNNING)))


@pytest.fixture(scope="session")
def server(
    model_folder: Path, rollout: RolloutConfig, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    logs = tmp_path_factory.mktemp("logs")
    with server_pool(model_folder, rollout, params_dtype="fp32", log_folder=logs) as servers:
        yield servers[0]


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[SglangClient]:
    with SglangClient(server.endpoint) as client:
        yield client


@pytest.fixture(scope="session")
def reference(model_folder: Path) -> PreTrainedModel:
    """The same checkpoint in ``transformers``, fp32."""
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture
def weights(model_folder: Path) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors by their Hugging Face names."""
    return load_file(model_folder / "model.safetensors")


@pytest.fixture(scope="session")
def versions() -> Iterator[int]:
    """Policy versions that no other test has used."""
    return itertools.count(1)


@pytest.fixture
def original_weights(
    client: SglangClient, model_folder: Path, versions: Iterator[int]
) -> Iterator[None]:
    """For tests that change what is served: the checkpoint is served again after them."""
    yield
    publish_from_disk([client], model_folder, next(versions))
