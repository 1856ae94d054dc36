"""GPT-OSS's attention and experts with Transformer Engine's modules on one GPU, against
transformers."""

from pathlib import Path

import pytest
import torch

from tests.tiny_models import write_tiny_gpt_oss

pytestmark = pytest.mark.gpu
# Every expert is chosen: rounding cannot send a token to another one.
SIZES = {"num_experts_per_tok": 4, "head_dim": 64, "hidden_size": 256, "intermediate_size": 256}


def test_logits_equal_transformers_in_bf16(tmp_path: Path, one_rank: torch.device) -> None:
    import transformers

    from tests.gpu.steps import VOCABULARY, prefix_logits, sampled

    folder = write_tiny_gpt_oss(
        tmp_path, vocab_size=VOCABULARY, initializer_range=0.05, swiglu_limit=7.0, **SIZES
    )
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = reference.to(one_rank)
    got = prefix_logits(folder, sampled(), one_rank, "bf16", together=True)
    for rollout, logits in zip(sampled(), got, strict=True):
        ids = torch.tensor([(*rollout.prompt_ids, *rollout.prefix_ids)[:-1]], device=one_rank)
        with torch.no_grad():
            expected = reference(ids).logits[0, len(rollout.prompt_ids) - 1 :, :VOCABULARY].cpu()
        assert (logits - expected).norm() < 0.02 * expected.norm()
