"""One step on the CPU's own layers in fp32, for a test that runs the same on a GPU.

python -m tests.gpu.cpu_reference STUDENT TEACHER RESULT       (with no GPU to be seen)
"""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_prefix.mcore.cpu import adapt_to_cpu


def main(arguments: list[str]) -> None:
    student, teacher, result = map(Path, arguments)
    adapt_to_cpu()
    from megatron_prefix.mcore.groups import initialize_megatron
    from tests.gpu.steps import Setting, one_step

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        initialize_megatron(1)
        outcome = one_step(Setting(student, teacher, "fp32"), torch.device("cpu"))
        dist.destroy_process_group()
    torch.save(asdict(outcome), result)


if __name__ == "__main__":
    main(sys.argv[1:])
