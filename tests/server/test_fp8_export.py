"""What ``--dtype fp8`` writes, loaded by a real server: SGLang's own reader of the config and own
loader of names, shapes and scales. A CPU has no kernel for it, so the server then dequantises."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from megatron_prefix.config import RolloutConfig
from megatron_prefix.mcore.cpu import adapt_to_cpu
from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.rollout.checksum import WeightHasher, verify
from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.protocol import Sampling
from megatron_prefix.rollout.server import server_pool
from tests.tiny_models import as_published, write_tiny_deepseek_v3, write_tiny_qwen3_moe

adapt_to_cpu()

from megatron_prefix.publisher import served_layout  # noqa: E402
from tests.distributed.test_convert import tensors, to_hf, to_megatron  # noqa: E402
from tests.distributed.test_fp8_blocks import dequantized  # noqa: E402

PROMPT = [5, 6, 7, 9, 20, 31]
TOKENS = 16
# What SGLang joins (q, k and v; gate and up; the latents' projections) has to be whole blocks of
# 128; the hidden size is not.
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "vocab_size": 100,
    "initializer_range": 0.1,
}


def write_qwen3_moe(folder: Path) -> Path:
    return write_tiny_qwen3_moe(folder, head_dim=64, **SIZES)


def write_deepseek_v3(folder: Path) -> Path:
    """With a dense layer and shared experts."""
    write_tiny_deepseek_v3(folder, q_lora_rank=128, **SIZES)
    return as_published(folder)


def greedy(model: PreTrainedModel) -> tuple[list[int], torch.Tensor]:
    """The continuation of PROMPT and its log-probabilities."""
    ids = model.generate(torch.tensor([PROMPT]), max_new_tokens=TOKENS, do_sample=False)
    with torch.no_grad():
        logprobs = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    new = ids[0, len(PROMPT) :]
    return new.tolist(), logprobs.gather(1, new[:, None])[:, 0]


@pytest.mark.parametrize(
    "write", [write_qwen3_moe, pytest.param(write_deepseek_v3, marks=pytest.mark.on_request)]
)
def test_a_server_loads_the_export(write: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    assert to_megatron(folder, tmp_path / "megatron") == 0
    assert to_hf(tmp_path / "megatron", tmp_path / "fp8", "--dtype", "fp8") == 0
    plain = dequantized(tmp_path / "fp8", tmp_path / "plain")
    with (
        server_pool(
            tmp_path / "fp8", RolloutConfig(device="cpu"), params_dtype="fp32", log_folder=tmp_path
        ) as servers,
        SglangClient(servers[0].endpoint) as client,
    ):
        layout = served_layout(read_hf_model(str(plain)), torch.float32, client.server_info())
        hasher = WeightHasher(layout)
        for name, tensor in tensors(plain).items():
            hasher.add(name, tensor)
        verify(client, hasher.checksums())  # every tensor to the last bit, each under its scales
        answer = client.generate([PROMPT], Sampling(TOKENS, temperature=0.0))[0]
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    tokens, logprobs = greedy(model)
    assert list(answer.token_ids) == tokens
    torch.testing.assert_close(torch.tensor(answer.logprobs), logprobs, rtol=0, atol=1e-4)
