"""The command line and the environment of an SGLang server. Pure, but for reading config.json."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.protocol import version_label

LOOPBACK = "127.0.0.1"
# Put on the path of a server on a CPU, and of no other: it has a package named sgl_kernel.
_CPU_ENGINE = Path(__file__).resolve().with_name("cpu_engine")
# SGLang's modules of the models that a CPU serves: of these, only the wanted one is imported.
SERVED_MODULES = {
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v2",
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
_DTYPES = {"bf16": "bfloat16", "fp32": "float32", "fp16": "float16"}
_CPU_CACHE_TOKENS = 60000  # SGLang's own guess takes most of the memory
# What torchrun tells its ranks. A server that believed it to be its own would look for the weight
# group's store at the agent's.
_TORCHRUN_VARIABLES = (
    ("MASTER_", "TORCHELASTIC_", "GROUP_", "ROLE_", "LOCAL_"),
    ("RANK", "WORLD_SIZE"),
)


# SGLang switches both off where nothing is said; the members of one group must agree. These are
# NCCL's own defaults, which the ranks have.
_NCCL_AS_IN_RANKS = {"NCCL_CUMEM_ENABLE": "-2", "NCCL_NVLS_ENABLE": "2"}


@dataclass(frozen=True)
class Launch:
    """What tells one server from another of the same ``RolloutConfig``."""

    folder: Path  # of the model
    device: str  # cuda | cpu
    params_dtype: str  # bf16 | fp32: the student's
    port: int
    index: int  # of the server on this machine, from 0
    seed: int
    host: str = LOOPBACK  # the one address that it listens on
    first_gpu: int = 0  # of this machine, where those of server 0 begin


def server_arguments(launch: Launch, rollout: RolloutConfig) -> list[str]:
    """Arguments of ``sglang.launch_server``; the user's come last and so win."""
    dtype = launch.params_dtype if rollout.dtype == "auto" else rollout.dtype
    options = {
        "--model-path": str(launch.folder),
        "--host": launch.host,
        "--port": launch.port,
        "--device": launch.device,
        "--dtype": _DTYPES.get(dtype, dtype),
        "--random-seed": launch.seed + launch.index,
        "--weight-version": version_label(0),
    }
    cache_tokens = rollout.max_total_tokens
    if launch.device == "cpu":
        options["--attention-backend"] = "torch_native"
        cache_tokens = cache_tokens or _CPU_CACHE_TOKENS
    else:
        options["--tp-size"] = rollout.server_tensor_parallel_size
        own = launch.index * rollout.server_tensor_parallel_size
        options["--base-gpu-id"] = launch.first_gpu + own
    if cache_tokens:
        options["--max-total-tokens"] = cache_tokens
    flags = [
        "--skip-server-warmup",
        "--skip-tokenizer-init",  # only token ids travel
        "--sleep-on-idle",  # an idle scheduler otherwise takes a whole core
        "--enable-metrics",
        "--incremental-streaming-output",  # a stream's events otherwise repeat all tokens so far
    ]
    pairs = [word for option, value in options.items() for word in (option, str(value))]
    return [*pairs, *flags, *rollout.server_args]


def server_environment(device: str, architecture: str, scratch: Path) -> dict[str, str]:
    """The environment of a server's process: this one's, less what is torchrun's or slows it."""
    prefixes, names = _TORCHRUN_VARIABLES
    environment = {
        name: value
        for name, value in os.environ.items()
        # Without bytecode, each of a server's three processes compiles all of torch and SGLang.
        if not name.startswith(prefixes) and name not in (*names, "PYTHONDONTWRITEBYTECODE")
    }
    environment |= {
        "HF_HUB_OFFLINE": "1",
        # Log-probabilities of the policy, not of its tempered softmax.
        "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",
        "TMPDIR": str(scratch),  # sockets and counters that SGLang does not remove
        # Otherwise the scheduler's store listens on all of the machine's addresses.
        "SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE": f"file://{scratch / 'rendezvous'}",
    }
    if device == "cpu":
        environment |= _cpu_environment(environment, architecture)
    else:
        environment = _NCCL_AS_IN_RANKS | environment
        environment["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"  # ranks have unlike shares
    return environment


def _cpu_environment(environment: dict[str, str], architecture: str) -> dict[str, str]:
    paths = [str(_CPU_ENGINE), environment.get("PYTHONPATH", "")]
    added = {
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    if architecture in SERVED_MODULES:
        added["SGLANG_EXTERNAL_MODEL_PACKAGE"] = "served_model"
        module = f"sglang.srt.models.{SERVED_MODULES[architecture]}"
        added["MEGATRON_PREFIX_SERVED_MODEL"] = f"{module}:{architecture}"
    if architecture.startswith("Deepseek"):
        added["TORCH_COMPILE_DISABLE"] = "1"  # its latent attention is compiled, for a GPU
    return added


def served_architecture(folder: Path) -> str:
    """The first of config.json's ``architectures``; ValueError where there is none, or where SGLang
    would serve another model under its name."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        architecture = str(config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{path} names no architecture to serve ({type(error).__name__}: {error}); "
            "give a Hugging Face model folder"
        ) from error
    # SGLang 0.5.23 reads neither setting, and leaves the experts that it makes up as they come.
    dense = config.get("mlp_only_layers") or (config.get("decoder_sparse_step") or 1) > 1
    if architecture == "Qwen3MoeForCausalLM" and dense:
        raise ValueError(
            f"{path}: SGLang gives every layer of a Qwen3-MoE experts, and this one has layers "
            "without (mlp_only_layers, decoder_sparse_step); serve another model"
        )
    return architecture


def resolve_device(device: str) -> str:
    """``auto`` as cuda where torch sees a GPU, else cpu."""
    if device != "auto":
        return device
    import torch  # late: most of what imports this module needs no torch

    return "cuda" if torch.cuda.is_available() else "cpu"
