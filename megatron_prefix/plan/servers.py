"""What the servers of a teacher hold: an estimate, since SGLang itself decides what it takes."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prefix.config import Recipe
from megatron_prefix.modes import needs_teacher, section_of
from megatron_prefix.plan.activations import DTYPE_BYTES
from megatron_prefix.plan.stages import whole_parameters
from megatron_prefix.safetensors_files import read_header, weight_files
from megatron_prefix.validate import ValidModel, ValidRun

if TYPE_CHECKING:
    from megatron_prefix.mcore.hf_map import HfModel

GIB = 1024**3
GPUS_A_NODE = 8
_FLOATS = ("F32", "F16", "BF16")  # what a server converts to its own precision
_QUANTISED = {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I32": 4}  # bytes; held as they lie


@dataclass(frozen=True)
class TeacherServers:
    """The servers of one teacher, which are alike; sizes in bytes."""

    domain: str
    count: int
    started: bool  # with the run; else they are running ones
    gpus: int  # of each that is started
    weights: int  # of one server, over all of its GPUs; 0: not known here
    cache_tokens: int  # of one server
    cache: int  # the keys and values of these tokens
    cache_shards: int  # GPUs that can share the cache: its heads

    def a_gpu(self, gpus: int) -> int:
        """With so many for a server."""
        return ceil(self.weights / gpus) + ceil(self.cache / min(gpus, self.cache_shards))

    def fewest_gpus(self, free: int) -> int:
        """The least power of two that holds a server; 0 where its cache alone is too large."""
        counts = (2**power for power in range(11))
        return next((gpus for gpus in counts if self.a_gpu(gpus) <= free), 0)


def teacher_servers(run: ValidRun) -> tuple[TeacherServers, ...]:
    """Of every teacher behind servers, in the recipe's order."""
    teachers = {"": run.teacher, **run.more_teachers} if needs_teacher(run.recipe) else {}
    behind = {name: each for name, each in teachers.items() if each.config.placement == "server"}
    return tuple(_servers(run.recipe, name, teacher) for name, teacher in behind.items())


def _servers(recipe: Recipe, domain: str, teacher: ValidModel) -> TeacherServers:
    server, data = teacher.config.server, recipe.data
    count = len(server.urls) or server.num_servers
    prompt = recipe.mode.teacher_prompt.max_length or data.max_prompt_length
    # As many as are asked for at once: a whole step's sequences.
    longest = prompt + recipe.prefix.max_length
    tokens = server.max_total_tokens or ceil(recipe.train.global_batch_size / count) * longest
    values, shards = _cache_values(teacher.hf)
    itemsize = DTYPE_BYTES[teacher.config.params_dtype]
    return TeacherServers(
        domain=domain,
        count=count,
        started=not server.urls,
        gpus=server.tensor_parallel_size,
        weights=weight_bytes(teacher.hf, itemsize),
        cache_tokens=tokens,
        cache=tokens * values * itemsize,
        cache_shards=shards,
    )


def _cache_values(hf: "HfModel") -> tuple[int, int]:
    """Values that a token leaves in the cache, and over how many GPUs they can be spread."""
    config, shape = hf.config, hf.shape
    if latent := config.get("kv_lora_rank"):  # every GPU holds the whole latent
        return shape.num_layers * (latent + config["qk_rope_head_dim"]), 1
    return 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels, shape.num_query_groups


def weight_bytes(hf: "HfModel", itemsize: int) -> int:
    """Of the folder's tensors; where only its config.json is here, of the family's name map."""
    files = weight_files(hf.path, str(hf.path))
    if stored := sum(_held(file, hf.skipped, itemsize) for file in files):
        return stored
    if not hf.units:
        from megatron_prefix.mcore.hf_map import FAMILIES, hf_model

        if hf.config["architectures"][0] not in FAMILIES:
            return 0
        hf = hf_model(str(hf.path), hf.config)
    return whole_parameters(hf) * itemsize


def _held(file: Path, skipped: tuple[str, ...], itemsize: int) -> int:
    return sum(
        prod(entry.shape) * (itemsize if entry.dtype in _FLOATS else _QUANTISED[entry.dtype])
        for name, entry in read_header(file).items()
        if not name.startswith(skipped) and entry.dtype in (*_FLOATS, *_QUANTISED)
    )


def servers_lines(servers: Iterable[TeacherServers], free: int) -> Iterator[str]:
    """For people; ``free``: bytes of a card that a server may have, 0 where no card is named."""
    for each in servers:
        section = section_of(each.domain)
        weights = f"{_gib(each.weights)} of weights" if each.weights else "weights not known here"
        line = (
            f"{section}.server, an estimate: each of {each.count} servers has {weights} and "
            f"{_gib(each.cache)} of KV cache for {each.cache_tokens:,} tokens"
        )
        if free and each.started:
            line += f", {_gib(each.a_gpu(each.gpus))} on each of its {each.gpus} GPUs"
        elif free and each.weights and (fewest := each.fewest_gpus(free)):
            nodes = ceil(fewest / GPUS_A_NODE)
            line += f": {fewest} GPUs of {_gib(free)} or more, {nodes} nodes of {GPUS_A_NODE}"
        yield f"{line}; none of it is in the table."


def refuse_servers(servers: Iterable[TeacherServers], free: int) -> None:
    """ValueError where weights alone are more than the GPUs of a server that is to start."""
    for each in servers:
        least = ceil(each.weights / each.gpus)
        if each.started and free and least > free:
            section = section_of(each.domain)
            raise ValueError(
                f"does not fit: a server of {section} has {_gib(least)} of weights on each of its "
                f"{each.gpus} GPUs, and {_gib(free)} are free; {_remedy(each, free)}, or name "
                f"running servers in {section}.server.urls"
            )


def _remedy(servers: TeacherServers, free: int) -> str:
    key, gpus = f"{section_of(servers.domain)}.server", servers.fewest_gpus(free)
    return f"set {key}.tensor_parallel_size={gpus}" if gpus else f"lower {key}.max_total_tokens"


def _gib(size: int) -> str:
    digits = 1 if size >= GIB else 4
    return f"{size / GIB:,.{digits}f} GiB"
