"""SORT-CHAIN learnt on one GPU with no server beside it, in bf16 and with an FP8 trunk."""

import pytest
import torch

from megatron_prefix.config import Fp8Config

pytestmark = pytest.mark.gpu
STEPS, PROBLEMS = 200, 200
# Of both layers: the student has no other.
WHOLE = {"first_last_layers_bf16": False}


@pytest.mark.parametrize("recipe", ["off", "tensorwise", "delayed"])
def test_sort_chain_is_learnt_without_servers(recipe: str, one_rank: torch.device) -> None:
    from tests.gpu.learning import Lesson, accuracy, learn

    fp8 = Fp8Config() if recipe == "off" else Fp8Config("hybrid", recipe, **WHOLE)
    lesson = Lesson.build(one_rank, STEPS, "bf16", fp8)
    assert accuracy(lesson.student.model, PROBLEMS, one_rank) < 0.3
    learn(lesson, STEPS)
    assert accuracy(lesson.student.model, PROBLEMS, one_rank) > 0.9
