"""Settings of the jobs that the GPU tests start."""

from pathlib import Path


def sort_chain_overrides(fp8: str, output: Path) -> list[str]:
    """The recipe of ``make quickstart`` on one rank, server and trainer on one card, in bf16."""
    settings: dict[str, object] = {
        "run.output_dir": output,
        "student.tensor_model_parallel_size": 1,
        "student.params_dtype": "bf16",
        "teacher.pipeline_model_parallel_size": 1,
        "teacher.num_layers_in_first_pipeline_stage": 0,
        "teacher.params_dtype": "bf16",
        "rollout.device": "cuda",
        "rollout.server_args": "[--mem-fraction-static,'0.2']",
    }
    if fp8 != "off":
        settings |= {"student.fp8.format": "hybrid", "student.fp8.recipe": fp8}
    return [f"{key}={value}" for key, value in settings.items()]
