"""A teacher behind servers in a recipe: what is refused, what it takes of the ranks, what of it
identifies a run."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prefix.config import DataConfig, ModelConfig, Recipe, TrainConfig
from megatron_prefix.data.tokenizers import write_byte_tokenizer
from megatron_prefix.jobs.cluster import Cluster, check_cluster
from megatron_prefix.plan import make_plan
from megatron_prefix.prefix import model_shape
from megatron_prefix.recipe import fingerprint, load_recipe, save_record
from megatron_prefix.rollout.addresses import node_file, write_endpoints
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.protocol import ServerUnavailable
from megatron_prefix.teachers.served import (
    endpoints_file,
    model_config,
    server_settings,
)
from megatron_prefix.teachers.server_files import ServerFiles
from megatron_prefix.validate import validate
from tests.tiny_models import write_tiny_llama, write_tiny_qwen3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_qwen3(folder / "student", vocab_size=264)
    write_tiny_llama(folder / "teacher", vocab_size=272, eos_token_id=261)
    for name in ("student", "teacher"):
        write_byte_tokenizer(folder / name)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "x"}))
    return Recipe(
        student=ModelConfig(hf_path=str(folder / "student"), params_dtype="fp32"),
        teacher=ModelConfig(hf_path=str(folder / "teacher"), placement="server"),
        data=DataConfig(path=str(folder / "prompts.jsonl"), max_prompt_length=64),
        train=TrainConfig(steps=20, global_batch_size=32, micro_batch_size=4),
        prefix=replace(Recipe().prefix, min_length=4, max_length=32),
    )


def overlaid(recipe: Recipe, tmp_path: Path, *overrides: str) -> Recipe:
    return load_recipe(str(save_record(recipe, tmp_path)), overrides=overrides)


def test_it_takes_no_rank_and_no_bytes_but_its_top_k(recipe: Recipe) -> None:
    run = validate(recipe)
    assert run.world_size == 1 and run.teacher.layers == ()
    (rank,) = make_plan(run).ranks
    assert (rank.teachers, rank.teacher_weights, rank.teacher_head) == ((), 0, 0)
    assert rank.teacher_hidden == 4 * 32 * 64 * 12  # one microbatch of the default top_k
    two = validate(replace(recipe, run=replace(recipe.run, world_size=2)))
    assert [rank.teachers for rank in make_plan(two).ranks] == [(), ()]


def test_the_ledger_counts_its_forward_as_any_teachers(recipe: Recipe) -> None:
    beside = replace(recipe, teacher=replace(recipe.teacher, placement="colocated"))
    here, there = (make_plan(validate(each)).cost.run.flops for each in (recipe, beside))
    assert here == there and here.teacher > 0


def test_a_family_that_megatron_does_not_hold_will_do(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "teacher"
    write_tiny_llama(folder, vocab_size=264)
    write_byte_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rms_norm_eps"]
    config["architectures"] = ["Gemma9ForConditionalGeneration"]
    whole = {"architectures": config.pop("architectures"), "text_config": config}
    whole["eos_token_id"] = config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(whole))
    teacher = replace(recipe.teacher, hf_path=str(folder))
    run = validate(replace(recipe, teacher=teacher))
    assert run.teacher.hf.shape.vocab_size == 264
    assert model_shape(model_config(teacher)).hidden == 64
    with pytest.raises(ValueError, match="Gemma9ForConditionalGeneration is not supported"):
        validate(replace(recipe, teacher=replace(teacher, placement="colocated")))
    del config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="does not say 'vocab_size'"):
        validate(replace(recipe, teacher=teacher))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("loss.temperature=2", "loss.temperature=2.0 needs the teacher's whole vocabulary"),
        ("loss.divergence=relaxed_kl", "relaxed_kl needs the teacher's whole vocabulary"),
        ("prefix.overlap_k=8", "prefix.overlap_k=8 needs the teacher's whole vocabulary"),
        ("teacher.server.top_k=264", "teacher.server.top_k=264 leaves no tail of the 264 tokens"),
        ("teacher.server.top_k=0", "teacher.server.top_k=0 must be at least 1"),
        ("teacher.tensor_model_parallel_size=2", "teacher.tensor_model_parallel_size=2 is about"),
        ("teacher.fp8.format=e4m3", "teacher.fp8.format=e4m3 is about Megatron"),
        (
            "teacher.pipeline_model_parallel_size=2 teacher.sequence_parallel=true",
            "teacher.pipeline_model_parallel_size=2, teacher.sequence_parallel=True are about",
        ),
        (
            "teacher.pipeline_model_parallel_size=2 teacher.sequence_parallel=true",
            "teacher.pipeline_model_parallel_size=1 teacher.sequence_parallel=False (teacher.",
        ),
        ("teacher.world_size=2", "needs teacher.placement=separate; a server teacher has no ranks"),
        ("teacher.placement=colocated teacher.server.top_k=8", "set teacher.placement=server or"),
        ("student.placement=server", "are settings of a teacher"),
        ("student.server.top_k=8", "student.server has settings of a teacher"),
        ("teacher.server.urls=[ftp://x]", "'ftp://x' is no URL like"),
        ("teacher.server.api_key_file=none.key", "none.key does not exist"),
        ("teacher.server.verify_weights=true", "is for servers at teacher.server.urls"),
        ("teacher.server.start_timeout_s=900", "request_timeout_s=120 must be at most 513: "),
        ("teacher.server.args=[--port,9]", "teacher.server.args: --port is set by the trainer"),
        ("teacher.hf_path=nowhere", "teacher.hf_path=nowhere"),
        ("mode.name=sft", "but no step of mode.name=sft asks the teacher"),
        ("mode.refresh_teacher_every=5", "mode.refresh_teacher_every=5"),
    ],
)
def test_what_no_server_can_do_is_refused_in_one_line(
    recipe: Recipe, tmp_path: Path, override: str, words: str
) -> None:
    with pytest.raises(ValueError) as error:
        validate(overlaid(recipe, tmp_path, *override.split()))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_where_servers_are_may_change_and_what_they_tell_may_not(
    recipe: Recipe, tmp_path: Path
) -> None:
    def print_of(*overrides: str) -> str:
        return fingerprint(overlaid(recipe, tmp_path, *overrides))

    own = fingerprint(recipe)
    assert print_of("teacher.server.urls=[http://a:1]", "teacher.server.restarts=2") == own
    assert print_of("teacher.server.top_k=8") != own
    assert print_of("teacher.placement=colocated") != own


def test_endpoints_are_the_recipes_the_launchers_or_the_nodes(
    recipe: Recipe, tmp_path: Path
) -> None:
    running = tmp_path / "running.json"  # of the rollouts' servers
    write_endpoints(running, [Endpoint("http://r:1", "k")])

    def found(recipe: Recipe, files: ServerFiles) -> list[Endpoint]:
        servers = replace(files, rollouts=running).find(recipe, lambda: False)
        assert servers and [each.url for each in servers.rollouts] == ["http://r:1"]
        return servers.teachers[""]

    key = tmp_path / "key"
    key.write_text("secret\n")
    named = overlaid(
        recipe,
        tmp_path,
        "teacher.server.urls=[http://a:1,http://b:2]",
        f"teacher.server.api_key_file={key}",
        "teacher.server.request_timeout_s=7",
    )
    first, second = found(named, ServerFiles())
    assert (first.url, second.url) == ("http://a:1", "http://b:2")
    assert (first.api_key, first.timeout_s, first.settings) == ("secret", 7.0, "teacher.server")
    with pytest.raises(ValueError, match="teacher.server.urls is empty, and nothing here starts"):
        ServerFiles().check(recipe)
    write_endpoints(endpoints_file(tmp_path, ""), [Endpoint("http://c:3", "k")])
    (ours,) = found(recipe, ServerFiles(teachers=tmp_path))
    assert (ours.url, ours.settings) == ("http://c:3", "teacher.server")
    for node in (0, 1):
        write_endpoints(node_file(tmp_path, "teacher", node), [Endpoint(f"http://d:{node}", "k")])
    spread = found(recipe, ServerFiles(teachers=tmp_path, teacher_nodes=2))
    assert [each.url for each in spread] == ["http://d:0", "http://d:1"]
    late = replace(recipe.teacher.server, start_timeout_s=0.0)
    hasty = replace(recipe, teacher=replace(recipe.teacher, server=late))
    with pytest.raises(ServerUnavailable, match="2 of 3 .* teacher.server.start_timeout_s=0;"):
        found(hasty, ServerFiles(teachers=tmp_path, teacher_nodes=3))
    files = ServerFiles(running, teachers=tmp_path, teacher_nodes=3)
    assert files.find(recipe, lambda: True) is None, "a signal came first"
    assert server_settings(named, named.teacher).request_timeout_s == 7.0


def test_over_nodes_a_teachers_servers_run_already_or_have_nodes_of_their_own(
    recipe: Recipe, tmp_path: Path
) -> None:
    cluster = Cluster(executor="slurm", nodes=2, server_nodes=1)
    with pytest.raises(ValueError, match="urls is empty.* give --teacher-server-nodes 1, or name"):
        check_cluster(cluster, recipe)
    running = replace(recipe.teacher.server, urls=("http://a:1",))
    named = replace(recipe, teacher=replace(recipe.teacher, server=running))
    check_cluster(cluster, named)
    serving = replace(cluster, nodes=3, teacher_server_nodes=1)
    check_cluster(serving, recipe)
    with pytest.raises(ValueError, match="--teacher-server-nodes 1 is not needed"):
        check_cluster(serving, named)
    with pytest.raises(ValueError, match="--server-nodes 1 and --teacher-server-nodes 1 of --node"):
        check_cluster(replace(serving, nodes=2), recipe)
    command = [sys.executable, "-m", "megatron_prefix.teachers.serve", "--host", "127.0.0.1"]
    command += [str(save_record(named, tmp_path)), "--endpoints-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no teacher has placement=server and an empty server.urls" in done.stderr
