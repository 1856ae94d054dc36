"""The one model class that is served, by the architecture's name in its config.json.

SGLang imports this in the scheduler's process, which makes it the place for the hook below.
"""

import importlib
import os

from sglang.srt import batch_invariant_ops

SGLANG_MODULES = {
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


def _keep_cpu_kernels(*args: object, **kwargs: object) -> None:
    """``--enable-deterministic-inference`` swaps in Triton kernels, which need a GPU. torch's own
    kernels on a CPU gave the same tokens alone, in a batch and in another order."""


architecture = os.environ["MEGATRON_PREFIX_ARCHITECTURE"]
module = importlib.import_module(f"sglang.srt.models.{SGLANG_MODULES[architecture]}")
EntryClass = [getattr(module, architecture)]
batch_invariant_ops.enable_batch_invariant_mode = _keep_cpu_kernels
