"""Weights in host memory change nothing of what a teacher says, and leave the device in between."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_prefix.batch import plan_microbatches
from megatron_prefix.config import ModelConfig, Recipe
from megatron_prefix.mcore.offload import HostWeights, Offload
from megatron_prefix.run_files.jsonl import METRICS
from megatron_prefix.teacher import ColocatedTeacher, SeveralTeachers, in_host_memory
from tests.distributed.ranks import run_ranks
from tests.distributed.test_separate_teacher import trained
from tests.distributed.test_several_teachers import DOMAIN, STEPS, in_domains, root, several
from tests.distributed.world import CPU, MICROBATCHES, Case, World, build, model_config

assert root  # the fixture of several teachers is this file's as well


def on_device(module: nn.Module) -> int:
    """Bytes behind a module's parameters now."""
    return sum(p.untyped_storage().nbytes() for p in module.parameters())


def two_layers() -> nn.Module:
    """With a parameter in another dtype, and one that stands for two."""
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3).to(torch.bfloat16))
    module.register_parameter("again", nn.Parameter(module[0].weight.data))
    return module.requires_grad_(False)


def test_weights_come_back_bit_for_bit_and_take_no_memory_in_between() -> None:
    module = two_layers()
    before = {name: p.clone() for name, p in module.named_parameters()}
    host = HostWeights(module)
    assert on_device(module) == 0
    assert host.nbytes == 4 * (5 * 7 + 7) + 2 * (7 * 3 + 3)
    for _ in range(2):
        with host.here():
            assert module.again.data_ptr() == module[0].weight.data_ptr()
            for name, parameter in module.named_parameters():
                assert torch.equal(parameter, before[name]), name
        assert on_device(module) == 0
    assert [tuple(p.shape) for p in module.parameters()] == [
        tuple(p.shape) for p in before.values()
    ]


def test_what_is_kept_is_what_comes_back() -> None:
    module = two_layers()
    host = HostWeights(module)
    with host.here():
        module[0].bias.fill_(2.0)
    with host.here():
        assert not torch.equal(module[0].bias, torch.full((7,), 2.0))
        module[0].bias.fill_(3.0)
        host.keep()
    with host.here():
        assert torch.equal(module[0].bias, torch.full((7,), 3.0))


def test_a_step_begins_with_the_first_models_weights_alone() -> None:
    modules = [two_layers(), two_layers()]
    weights = [HostWeights(module) for module in modules]
    offload = Offload(weights)
    offload.begin_step(used=False)
    assert [on_device(module) for module in modules] == [0, 0]
    offload.begin_step(used=True)
    assert on_device(modules[0]) > 0 == on_device(modules[1])
    weights[0].release()
    with weights[1].here():
        pass
    assert offload.take_waited()["offload"] > 0
    assert offload.take_waited() == {"offload": 0.0}
    assert Offload().take_waited() == {}


def test_copies_in_fp8_go_with_the_weights() -> None:
    module = two_layers()
    module[0]._fp8_workspaces = {"weight": torch.ones(3)}  # Transformer Engine's name for them
    HostWeights(module)
    assert module[0]._fp8_workspaces == {}


def offloaded(recipe: Recipe) -> Recipe:
    teachers = {name: replace(each, offload=True) for name, each in recipe.teachers.items()}
    run = replace(recipe.run, name=f"{recipe.run.name} offloaded")
    return replace(
        recipe, run=run, teacher=replace(recipe.teacher, offload=True), teachers=teachers
    )


def test_a_run_is_the_same_to_the_last_bit_and_goes_on_with_the_setting_changed(root: Path) -> None:
    recipe = several(root, "resident", ("colocated",) * 2, replicas=2)
    there = trained(recipe, steps=STEPS)
    away = offloaded(recipe)
    trained(replace(away, teacher=replace(away.teacher, offload=False)), 1, STEPS)
    assert trained(away, steps=STEPS) == there
    lines = Path(recipe.run.output_dir, away.run.name, METRICS).read_text().splitlines()
    phases = [json.loads(line)["seconds"] for line in lines]
    assert all(each["offload"] > 0 and each["teacher"] > 0 for each in phases)


def turns(root: Path, config: ModelConfig) -> tuple[bool, list[list[bool]], int]:
    """On a rank of two: whether both teachers say what they say without offload, which were on the
    device at each forward, and the bytes there afterwards."""
    plain = World.build(Case(config, replace(config, hf_path=str(root / "teacher"))), 2)
    student = plain.student.model.groups
    models = {
        name: build(replace(config, hf_path=str(root / (name or "teacher"))), 2, owner="teacher")
        for name in ("", DOMAIN)
    }
    seen: list[list[bool]] = []

    def look(*_: object) -> None:
        seen.append([on_device(model.module) > 0 for model in models.values()])

    sampled = in_domains(0)
    plan = plan_microbatches(sampled, MICROBATCHES, multiple=8)

    def said(offload: bool) -> list[torch.Tensor]:
        each = {
            name: ColocatedTeacher(model, student.layout, CPU, name, offload=offload)
            for name, model in models.items()
        }
        teacher = SeveralTeachers(each, student)
        assert len(in_host_memory(teacher)) == (2 if offload else 0)
        Offload(in_host_memory(teacher)).begin_step(used=True)
        return [target.hidden for target in teacher.targets(sampled, plan)]

    there = said(False)
    for model in models.values():
        model.module.register_forward_pre_hook(look)
    away = said(True)
    same = all(torch.equal(one, other) for one, other in zip(there, away, strict=True))
    return same, seen, sum(on_device(model.module) for model in models.values())


@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_one_of_several_teachers_is_on_the_device_at_a_time(
    root: Path, layout: tuple[int, int]
) -> None:
    config = model_config(root / "student", *layout)
    for same, seen, left in run_ranks(2, turns, root, config):
        assert same and left == 0
        assert {tuple(each) for each in seen} == {(True, False), (False, True)}
