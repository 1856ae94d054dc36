"""DeepSeek-R1 671B, in FP8 on eight machines of its own, into an 8B student of its tokenizer.

Sixteen machines of eight H100: eight hold the teacher, four the student, four serve. The student is
one with Qwen3-8B's layers and the 129,280 tokens of DeepSeek-V3: no such checkpoint is published,
the folder is yours to give. The teacher's folder is R1 as it is published, its FP8 blocks
dequantised as they are read, or R1 in bf16; its trunk computes in FP8, in blocks of 128x128 as R1
was trained. The layout is by ``megatron-prefix plan``, not by a run.
"""

from megatron_prefix.config import (
    DataConfig,
    EvalConfig,
    Fp8Config,
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
    return Cluster(executor="slurm", nodes=16, server_nodes=4, gpus_per_node=8)


def recipe() -> Recipe:
    return Recipe(
        run=RunConfig(name="deepseek_r1_to_8b", gpu_memory_gib=79.0),
        student=ModelConfig(
            hf_path="models/Qwen3-8B-V3-tokenizer",
            tensor_model_parallel_size=4,
            sequence_parallel=True,
        ),
        teacher=ModelConfig(
            hf_path="models/DeepSeek-R1",
            placement="separate",
            world_size=64,
            tensor_model_parallel_size=8,
            pipeline_model_parallel_size=4,
            sequence_parallel=True,
            expert_model_parallel_size=16,
            expert_tensor_parallel_size=1,
            fp8=Fp8Config(format="e4m3", recipe="blockwise"),
        ),
        data=DataConfig(path="openai/gsm8k", name="main", prompt_column="question"),
        prefix=PrefixConfig(
            policy="linear", min_length=128, max_length=4096, linear=LinearConfig(over=0.8)
        ),
        rollout=RolloutConfig(
            num_servers=4,
            server_tensor_parallel_size=2,
            samples_per_prompt=4,
            over_sample=1.1,
            keep_aborted_above=0.5,
        ),
        optimizer=OptimizerConfig(lr=1e-6, lr_warmup_steps=10, overlap_grad_reduce=True),
        train=TrainConfig(steps=200, global_batch_size=256, micro_batch_size=4),
        eval=EvalConfig(
            path="openai/gsm8k",
            split="test",
            prompt_column="question",
            max_new_tokens=8192,
            samples=256,
            interval=50,
        ),
    )
