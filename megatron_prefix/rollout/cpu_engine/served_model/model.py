"""The one model class that is served: ``MEGATRON_PREFIX_SERVED_MODEL`` is its ``module:class``.

SGLang imports this in the scheduler's process, which makes it the place for the hooks below.
"""

import importlib
import os

from sglang.srt import batch_invariant_ops

from . import fp8_blocks


def _keep_cpu_kernels(*args: object, **kwargs: object) -> None:
    """``--enable-deterministic-inference`` swaps in Triton kernels, which need a GPU. torch's own
    kernels on a CPU gave the same tokens alone, in a batch and in another order."""


module, name = os.environ["MEGATRON_PREFIX_SERVED_MODEL"].split(":")
EntryClass = [getattr(importlib.import_module(module), name)]
batch_invariant_ops.enable_batch_invariant_mode = _keep_cpu_kernels
fp8_blocks.serve()

if name.startswith("Deepseek"):
    from sglang.srt.models.deepseek_common.attention_backend_handler import (
        AttentionBackendRegistry,
        AttnForwardMethod,
    )

    # torch_native, the one attention for a CPU, is not among those that DeepSeek's model knows.
    AttentionBackendRegistry.register("torch_native", lambda layer, batch: AttnForwardMethod.MLA)
    fp8_blocks.serve_latent_attention()
