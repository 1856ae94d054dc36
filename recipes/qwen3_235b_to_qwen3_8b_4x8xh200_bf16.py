"""Qwen3-235B-A22B into Qwen3-8B on four machines of eight H200, in bf16.

The teacher's experts are shared sixteen ways; servers have a fifth machine. The layout is by
``megatron-prefix plan``, not by a run. Fetch the folders first: ``hf download Qwen/Qwen3-8B
--local-dir models/Qwen3-8B`` and the same for Qwen3-235B-A22B.
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
from megatron_prefix.jobs.cluster import Cluster


def cluster() -> Cluster:
    return Cluster(executor="slurm", nodes=5, server_nodes=1, gpus_per_node=8)


def recipe() -> Recipe:
    return Recipe(
        run=RunConfig(name="qwen3_235b_to_qwen3_8b", gpu_memory_gib=139.0),
        student=ModelConfig(
            hf_path="models/Qwen3-8B",
            tensor_model_parallel_size=4,
            sequence_parallel=True,
        ),
        teacher=ModelConfig(
            hf_path="models/Qwen3-235B-A22B",
            tensor_model_parallel_size=4,
            sequence_parallel=True,
            expert_model_parallel_size=16,
            expert_tensor_parallel_size=1,
        ),
        data=DataConfig(path="openai/gsm8k", name="main", prompt_column="question"),
        prefix=PrefixConfig(
            policy="linear", min_length=64, max_length=1024, linear=LinearConfig(over=0.8)
        ),
        rollout=RolloutConfig(
            num_servers=4,
            server_tensor_parallel_size=2,
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
