"""What a machine with GPUs refuses, told without one."""

from dataclasses import replace

import pytest

from megatron_prefix.config import ModelConfig
from megatron_prefix.preflight import refuse_fp32_shares


def test_fp32_is_not_cut_over_context_parallel_ranks_of_a_gpu() -> None:
    cut = ModelConfig("model", context_parallel_size=2, params_dtype="fp32")
    with pytest.raises(ValueError, match="teacher.context_parallel_size=2 .* set teacher.params"):
        refuse_fp32_shares(cut, "teacher")
    refuse_fp32_shares(replace(cut, params_dtype="bf16"), "teacher")
