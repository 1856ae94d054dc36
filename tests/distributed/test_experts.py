"""Mixtures of experts train in every layout as on one rank; what cannot be is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prefix.mcore.hf_map import read_hf_model
from megatron_prefix.validate import check_model
from tests.distributed.ranks import run_ranks
from tests.distributed.test_checkpoint import ADAM, steps_from
from tests.distributed.test_layouts import STEPS, check_same_training
from tests.distributed.world import Case, Run, model_config, train
from tests.tiny_models import (
    write_tiny_deepseek_v2,
    write_tiny_deepseek_v3,
    write_tiny_gpt_oss,
    write_tiny_mixtral,
    write_tiny_qwen3_moe,
)

EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tp": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 62, "num_key_value_heads": 4, "initializer_range": 0.05}
    return {
        "qwen3-moe": write_tiny_qwen3_moe(root / "qwen", mlp_only_layers=[1], **sizes),
        "mixtral": write_tiny_mixtral(root / "mixtral", **sizes),
        "teacher": write_tiny_qwen3_moe(root / "teacher", seed=1, hidden_size=96, **sizes),
        "deepseek-v3": write_tiny_deepseek_v3(root / "v3", **sizes),
        "gpt-oss": write_tiny_gpt_oss(root / "oss", **sizes),
        "deepseek-v2": write_tiny_deepseek_v2(root / "v2", seed=1, hidden_size=96, **sizes),
    }


LAYOUTS = {
    "dp2": (2, {}, {}),
    "ep2": (2, EP2, {}),
    "tp2": (2, TP2, TP2),
    "tp2, whole experts": (2, TP2 | {"expert_tensor_parallel_size": 1}, TP2),
    "tp2, ep2": (2, TP2 | EP2 | {"expert_tensor_parallel_size": 1}, TP2),
    "tp2, ep2, both cut experts": (4, TP2 | EP2, TP2 | EP2),
    "pp2, teacher ep2": (2, {"pp": 2}, EP2),
    "pp2, ep2": (4, {"pp": 2} | EP2, {"pp": 2} | EP2),
    "dp4, ep2": (4, EP2, {"expert_model_parallel_size": 4}),
    "recompute, ep2": (2, EP2 | {"recompute_granularity": "full"}, {}),
    # A stage computes a microbatch's layers again after it began the next one.
    "recompute, pp2": (2, {"pp": 2, "recompute_granularity": "full"}, {}),
}


SOME = ("tp2", "tp2, ep2", "tp2, ep2, both cut experts", "pp2, ep2", "recompute, pp2")
# The student's family, the teacher's model, and the layouts that they are trained in.
TRAINED = {
    ("qwen3-moe", "teacher"): LAYOUTS,
    ("mixtral", "teacher"): LAYOUTS,
    ("deepseek-v3", "deepseek-v2"): SOME,
    ("gpt-oss", "teacher"): ("tp2, ep2", "pp2, ep2", "recompute, ep2"),
}


@pytest.mark.parametrize(
    ("family", "taught_by", "name"),
    [(*models, name) for models, names in TRAINED.items() for name in names],
)
def test_trains_as_one_rank_does(
    family: str,
    taught_by: str,
    name: str,
    models: dict[str, Path],
    on_one_rank: Callable[[Case, int], Run],
) -> None:
    """Mixtral with the plain optimizer, the others with the distributed one."""
    world_size, student, teacher = LAYOUTS[name]
    optimizer = replace(Case.optimizer, use_distributed_optimizer=family != "mixtral")

    def case(student: dict, teacher: dict) -> Case:
        return Case(
            model_config(models[family], **student),
            model_config(models[taught_by], **teacher),
            optimizer,
        )

    ranks = run_ranks(world_size, train, case(student, teacher), world_size, STEPS)
    check_same_training(ranks, on_one_rank(case({}, {}), STEPS), models[family])


CHECKPOINTS = {
    "same layout": (2, EP2, 2, EP2),
    "ep2 to one rank": (2, EP2, 1, {}),
    "ep2 to pp2": (2, EP2, 2, {"pp": 2}),
    "one rank to tp2, ep2": (
        1,
        {},
        2,
        TP2 | EP2 | {"expert_tensor_parallel_size": 1},
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_load_into_any_layout(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    saved_on, saved, resumed_on, resumed = CHECKPOINTS[name]

    def case(settings: dict) -> Case:
        teacher = TP2 if "tp" in settings else {}
        student = model_config(models["qwen3-moe"], **settings)
        return Case(student, model_config(models["teacher"], **teacher), ADAM)

    whole = run_ranks(saved_on, steps_from, case(saved), tmp_path, saved_on, 5, (3,))
    rest = run_ranks(resumed_on, steps_from, case(resumed), tmp_path, resumed_on, 5)
    assert len(rest[0]) == 2
    for mine, theirs in zip(rest[0], whole[0][3:], strict=True):
        assert mine == pytest.approx(theirs, rel=0 if name == "same layout" else 5e-6)


def test_experts_with_biases_are_not_cut(models: dict[str, Path]) -> None:
    hf = read_hf_model(str(models["gpt-oss"]))
    with pytest.raises(ValueError, match="student.expert_tensor_parallel_size=2 .* set it to 1"):
        check_model(hf, model_config(models["gpt-oss"], **TP2), "student")
    whole = model_config(models["gpt-oss"], **TP2, expert_tensor_parallel_size=1)
    assert check_model(hf, whole, "student") == (2,)
