"""Qwen3-32B into Qwen3-8B on one machine of eight H100 80 GB, in bf16.

The layout is by ``megatron-prefix plan``, not by a run: over tensor parallel 8, a rank holds 17 GiB
of the student with its optimizer and 8 GiB of the teacher; the server takes 40% of each card beside
them. On H200 (``run.gpu_memory_gib=139``) there is room for twice the microbatch.
Fetch the folders first: ``hf download Qwen/Qwen3-8B --local-dir models/Qwen3-8B`` and the same for
Qwen3-32B, or point ``student.hf_path`` and ``teacher.hf_path`` at them.
"""

from megatron_prefix.config import (
    DataConfig,
    EvalConfig,
    LinearConfig,
    ModelConfig,
    OptimizerConfig,
    PrefixConfig,
    Recipe,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)


def recipe() -> Recipe:
    return Recipe(
        run=RunConfig(name="qwen3_32b_to_qwen3_8b", gpu_memory_gib=79.0),
        student=ModelConfig(
            hf_path="models/Qwen3-8B",
            tensor_model_parallel_size=8,
            sequence_parallel=True,
            recompute_granularity="selective",
        ),
        teacher=ModelConfig(
            hf_path="models/Qwen3-32B", tensor_model_parallel_size=8, sequence_parallel=True
        ),
        data=DataConfig(path="openai/gsm8k", name="main", prompt_column="question"),
        prefix=PrefixConfig(
            policy="linear", min_length=64, max_length=1024, linear=LinearConfig(over=0.8)
        ),
        rollout=RolloutConfig(
            server_tensor_parallel_size=8,
            server_args=("--mem-fraction-static", "0.4"),
            samples_per_prompt=4,
            over_sample=1.1,
            keep_aborted_above=0.5,
        ),
        optimizer=OptimizerConfig(lr=1e-6, lr_warmup_steps=10, overlap_grad_reduce=True),
        train=TrainConfig(steps=200, global_batch_size=256, micro_batch_size=8),
        eval=EvalConfig(
            path="openai/gsm8k",
            split="test",
            prompt_column="question",
            max_new_tokens=4096,
            samples=256,
            interval=50,
        ),
    )
