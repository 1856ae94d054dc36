"""SORT-CHAIN on one machine without a GPU: what ``make quickstart`` runs.

Student A plans badly; the teacher corrects it from prefixes of 9 tokens, with every eighth step at
full length to hold the rest of the response in place.
"""

from megatron_prefix.config import (
    AnchoredConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    PrefixConfig,
    Recipe,
    RunConfig,
    TrainConfig,
)
from megatron_prefix.tasks import sort_chain

DATA_FOLDER = ".cache/sort_chain"


def write_data() -> None:
    """What the recipe reads; commands call it first. In no time, and nothing where it is there."""
    sort_chain.prepare_data(DATA_FOLDER)


def recipe() -> Recipe:
    files = sort_chain.data_files(DATA_FOLDER)
    lr = 1e-3
    return Recipe(
        run=RunConfig(name="quickstart"),
        student=ModelConfig(
            hf_path=str(sort_chain.model_folder("student_a")),
            tensor_model_parallel_size=2,
            params_dtype="fp32",
        ),
        teacher=ModelConfig(
            hf_path=str(sort_chain.model_folder("teacher")),
            pipeline_model_parallel_size=2,
            num_layers_in_first_pipeline_stage=2,
            params_dtype="fp32",
        ),
        data=DataConfig(path=str(files.train), max_prompt_length=sort_chain.PROMPT_LENGTH),
        prefix=PrefixConfig(
            policy="anchored",
            min_length=9,
            max_length=sort_chain.RESPONSE_LENGTH,
            anchored=AnchoredConfig(every=8),
        ),
        optimizer=OptimizerConfig(lr=lr, min_lr=0.1 * lr, lr_warmup_steps=10),
        train=TrainConfig(steps=200, global_batch_size=32, micro_batch_size=32),
        checkpoint=CheckpointConfig(keep_last=1),
        eval=EvalConfig(
            path=str(files.held_out),
            scorer="suffix",
            max_new_tokens=sort_chain.RESPONSE_LENGTH,
            samples=sort_chain.NUM_HELD_OUT,
        ),
        log=LogConfig(log_interval=10),
    )
