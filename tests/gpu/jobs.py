"""Settings of the jobs that the GPU tests start."""

from pathlib import Path


def sort_chain_overrides(fp8: str, output: Path, stages: int = 1) -> list[str]:
    """The recipe of ``make quickstart`` in bf16, both models in stages of a card each,
    on the first the server as well."""
    settings: dict[str, object] = {
        "run.output_dir": output,
        "student.tensor_model_parallel_size": 1,
        "student.pipeline_model_parallel_size": stages,
        "student.params_dtype": "bf16",
        "teacher.pipeline_model_parallel_size": stages,
        "teacher.num_layers_in_first_pipeline_stage": 0,
        "teacher.params_dtype": "bf16",
        "rollout.device": "cuda",
        "rollout.server_args": "[--mem-fraction-static,'0.2']",
    }
    if fp8 != "off":
        # In both layers: the student has none between the first and the last.
        fields = {"format": "hybrid", "recipe": fp8, "first_last_layers_bf16": False}
        settings |= {f"student.fp8.{name}": value for name, value in fields.items()}
    return [f"{key}={value}" for key, value in settings.items()]
