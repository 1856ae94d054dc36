"""Transformer Engine's side of context parallelism: on one GPU which tokens it takes for a rank's
and what it turns them by, on two a step over ranks."""

from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
RANKS = 2
CU_SEQLENS = (0, 8, 12, 32)  # sequences of multiples of twice the ranks


def test_a_share_is_what_transformer_engine_takes_for_it(one_rank: torch.device) -> None:
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    from megatron_prefix.context_shares import zigzag

    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=one_rank)
    own = zigzag(cu_seqlens, RANKS)
    for rank in range(RANKS):
        theirs = context_parallel.get_thd_partitioned_indices(
            cu_seqlens, CU_SEQLENS[-1], RANKS, rank
        )
        assert own[rank].tolist() == theirs.tolist()


def test_a_share_is_turned_as_in_the_whole_pack(one_rank: torch.device) -> None:
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb_thd

    from megatron_prefix.context_shares import zigzag

    cu_seqlens = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=one_rank)
    width, longest = 64, 20
    turns = torch.arange(longest, device=one_rank)[:, None] / 10 ** (
        torch.arange(0, width, 2, device=one_rank) / width
    )
    angles = torch.cat([turns, turns], dim=-1)[:, None, None]
    query = torch.randn(CU_SEQLENS[-1], 4, width, device=one_rank)
    whole = fused_apply_rotary_pos_emb_thd(query, cu_seqlens, angles)
    assert not torch.equal(whole, query)
    for rank, own in enumerate(zigzag(cu_seqlens, RANKS)):
        share = query[own].contiguous()
        turned = fused_apply_rotary_pos_emb_thd(
            share, cu_seqlens, angles, cp_size=RANKS, cp_rank=rank
        )
        torch.testing.assert_close(turned, whole[own])


@pytest.mark.parametrize("fp8", ["off", "blockwise"])
def test_a_step_over_two_ranks_equals_one_ranks(
    fp8: str, tmp_path: Path, one_rank: torch.device
) -> None:
    if torch.cuda.device_count() < RANKS:
        pytest.skip(f"needs {RANKS} GPUs, one a rank")
    from megatron_prefix.config import Fp8Config
    from megatron_prefix.mcore.ranks import run_on_ranks
    from tests.gpu.steps import Setting, cosine, one_step, own_step, write_models

    folders = write_models(tmp_path)
    recipe = Fp8Config() if fp8 == "off" else Fp8Config("e4m3", fp8)
    expected = one_step(Setting(*folders, fp8=recipe), one_rank)
    cut = Setting(*folders, fp8=recipe, context_parallel_size=RANKS)
    first, second = run_on_ranks(RANKS, own_step, cut)
    assert first.loss == second.loss == pytest.approx(expected.loss, rel=0.01)
    assert torch.equal(first.gradient, second.gradient)
    assert cosine(first.gradient, expected.gradient) > 0.99
