"""A teacher behind SGLang servers: what of it is refused before anything starts, its sizes, and its
servers' settings. Its family need not be one that Megatron-Core can hold."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_prefix.config import Fp8Config, ModelConfig, Recipe, RolloutConfig
from megatron_prefix.health.watchdog import longest_wait
from megatron_prefix.modes import section_of, teachers_of

if TYPE_CHECKING:
    from megatron_prefix.mcore.hf_map import HfModel

_OUR_ARGUMENTS = ("--model-path", "--host", "--port", "--device", "--dtype", "--weight-version")


def server_settings(recipe: Recipe, teacher: ModelConfig) -> RolloutConfig:
    """A teacher's servers in the words that rollout/ starts and asks servers with."""
    server = teacher.server
    return RolloutConfig(
        server_urls=server.urls,
        api_key_file=server.api_key_file,
        num_servers=server.num_servers,
        device=recipe.rollout.device,
        server_tensor_parallel_size=server.tensor_parallel_size,
        max_total_tokens=server.max_total_tokens,
        server_args=server.args,
        start_timeout_s=server.start_timeout_s,
        request_timeout_s=server.request_timeout_s,
        hang_timeout_s=server.request_timeout_s,
        server_restarts=server.restarts,
        retries=server.retries,
    )


def endpoints_file(folder: Path, domain: str) -> Path:
    """Where the launcher leaves the addresses of a teacher's servers."""
    return folder / f"{section_of(domain)}.json"


def check_served(recipe: Recipe) -> None:
    """ValueError for what no server can do, with the setting that could."""
    for domain, teacher in teachers_of(recipe).items():
        section = section_of(domain)
        if teacher.placement == "server":
            _check_one(recipe, teacher, section)
        elif teacher.server != type(teacher.server)():
            raise ValueError(
                f"{section}.server has settings and {section}.placement={teacher.placement}; set "
                f"{section}.placement=server or leave them out"
            )


def _check_one(recipe: Recipe, teacher: ModelConfig, section: str) -> None:
    ours = _of_megatron(teacher)
    if ours:
        words = ", ".join(f"{section}.{key}={value}" for key, value in ours.items())
        what, it = ("is", "it") if len(ours) == 1 else ("are", "them")
        plain = {**vars(ModelConfig()), "fp8.format": Fp8Config().format}
        defaults = " ".join(f"{section}.{key}={plain[key]}" for key in ours)
        raise ValueError(
            f"{words} {what} about Megatron, which does not hold a teacher with "
            f"{section}.placement=server; leave {it} out, or set {defaults} "
            f"({section}.server has its servers' settings)"
        )
    if recipe.loss.temperature != 1.0:
        raise ValueError(
            f"loss.temperature={recipe.loss.temperature} needs the teacher's whole vocabulary: "
            f"SGLang gives log-probabilities of a prompt at temperature 1; set it to 1, or "
            f"{section}.placement=colocated or separate"
        )
    needs = {"loss.divergence=relaxed_kl": recipe.loss.divergence == "relaxed_kl"}
    needs[f"prefix.overlap_k={recipe.prefix.overlap_k}"] = recipe.prefix.overlap_k > 0
    for setting in (setting for setting, needed in needs.items() if needed):
        raise ValueError(
            f"{setting} needs the teacher's whole vocabulary, and its servers name top-k tokens; "
            f"leave it out, or set {section}.placement=colocated or separate"
        )
    server, limit = teacher.server, longest_wait(recipe.run.distributed_timeout_s)
    longest = server.start_timeout_s + server.request_timeout_s
    if longest > limit:
        raise ValueError(
            f"{section}.server.start_timeout_s={server.start_timeout_s:g} + request_timeout_s="
            f"{server.request_timeout_s:g} must be at most {limit:g}: no rank waits longer with "
            f"run.distributed_timeout_s={recipe.run.distributed_timeout_s:g}; set that to "
            f"{max(2 * longest, longest + 30):g}"
        )
    keys = (f"{section}.server.{name}" for name in ("urls", "args", "api_key_file"))
    check_servers(server_settings(recipe, teacher), tuple(keys))
    if server.verify_weights and not server.urls:
        raise ValueError(
            f"{section}.server.verify_weights=true is for servers at {section}.server.urls; those "
            "that are started here read the folder themselves; leave it out"
        )


def check_servers(servers: RolloutConfig, keys: tuple[str, ...]) -> None:
    """ValueError for addresses, arguments and a key file that cannot be; ``keys`` name the three in
    the recipe."""
    urls, args, key_file = keys
    for url in servers.server_urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{urls}: {url!r} is no URL like http://host:30000")
    for argument in servers.server_args:
        if argument.partition("=")[0] in _OUR_ARGUMENTS:
            raise ValueError(
                f"{args}: {argument} is set by the trainer for each server; leave it out (free "
                "ports are found, rollout.device, rollout.dtype and params_dtype are settings)"
            )
    if servers.api_key_file and not Path(servers.api_key_file).is_file():
        raise ValueError(f"{key_file}={servers.api_key_file} does not exist")


def _of_megatron(teacher: ModelConfig) -> dict[str, Any]:
    """Settings that a server has no use for and that are not as they come."""
    plain = ModelConfig()
    keys = (
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel"),
        *("num_layers_in_first_pipeline_stage", "expert_model_parallel_size"),
        *("expert_tensor_parallel_size", "context_parallel_size", "recompute_granularity"),
    )
    found = {
        key: getattr(teacher, key) for key in keys if getattr(teacher, key) != getattr(plain, key)
    }
    return found | ({"fp8.format": teacher.fp8.format} if teacher.fp8 != Fp8Config() else {})


def check_top_k(teacher: ModelConfig, vocabulary: int, section: str) -> None:
    """``vocabulary``: the ids that student and teacher both have."""
    if teacher.server.top_k >= vocabulary:
        raise ValueError(
            f"{section}.server.top_k={teacher.server.top_k} leaves no tail of the {vocabulary} "
            f"tokens that both models have; set it to {min(64, vocabulary - 1)} or less"
        )


def read_served(hf_path: str, owner: str) -> "HfModel":
    """The sizes of a folder's config.json, of any family; its weights, if it has any, are for the
    server to read. ValueError where the folder or a size is missing."""
    from megatron_prefix.mcore.hf_map import served_model

    path = Path(hf_path)
    where = f"{owner}.hf_path={hf_path}"
    if not hf_path or not (path / "config.json").is_file():
        raise ValueError(
            f"{where} has no config.json; give the folder of the checkpoint that the servers hold "
            "(config.json and tokenizer will do for servers that run already)"
        )
    try:
        config: Mapping[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return served_model(hf_path, dict(config))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{where}: config.json does not say {error}, which the ledger of FLOPs and the "
            "vocabulary need"
        ) from error


def model_config(model: ModelConfig) -> dict[str, Any]:
    """A model's config.json, for the ledger: a server's teacher may be of any family."""
    if model.placement == "server":
        return read_served(model.hf_path, "teacher").config
    from megatron_prefix.mcore.hf_map import read_hf_model

    return read_hf_model(model.hf_path).config
