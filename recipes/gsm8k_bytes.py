"""Real text on any pair of Hugging Face folders that share a tokenizer, small ones included.

GSM8K's questions as prompts, through the tokenizer's chat template where it has one; with
``megatron_prefix.data.tokenizers.write_byte_tokenizer`` a folder needs no downloaded vocabulary.
Give the folders and the file: ``student.hf_path=... teacher.hf_path=...
data.path=.../train.jsonl``, and ``eval.path=.../test.jsonl`` to have answers checked by
math-verify.
"""

from megatron_prefix.config import (
    DataConfig,
    EvalConfig,
    LinearConfig,
    ModelConfig,
    OptimizerConfig,
    PrefixConfig,
    Recipe,
    RunConfig,
    TrainConfig,
)


def recipe() -> Recipe:
    lr = 1e-4
    return Recipe(
        run=RunConfig(name="gsm8k_bytes"),
        student=ModelConfig(params_dtype="fp32"),
        teacher=ModelConfig(params_dtype="fp32"),
        # In bytes, 384 tokens hold nine questions in ten; longer ones are dropped and counted.
        data=DataConfig(prompt_column="question", max_prompt_length=384),
        prefix=PrefixConfig(
            policy="linear", min_length=16, max_length=64, linear=LinearConfig(over=0.8)
        ),
        optimizer=OptimizerConfig(lr=lr, min_lr=0.1 * lr, lr_warmup_steps=10),
        train=TrainConfig(steps=100, global_batch_size=16, micro_batch_size=8),
        eval=EvalConfig(prompt_column="question", max_new_tokens=64, samples=64),
    )
