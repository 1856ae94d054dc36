"""Whole jobs on one GPU: SORT-CHAIN in bf16 and in FP8, and a step at real width."""

import json
import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.gpu.jobs import sort_chain_overrides

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
# The CPU's run of the same recipe ends at 98.4% (README.md).
LEARNT = 0.9


@pytest.mark.parametrize(("fp8", "stages"), [("off", 1), ("tensorwise", 1), ("delayed", 2)])
def test_sort_chain_is_learnt(fp8: str, stages: int, tmp_path: Path) -> None:
    missing = [name for name in ("sglang", "omegaconf") if find_spec(name) is None]
    if missing:
        pytest.skip(f"a whole job needs {' and '.join(missing)}")
    if torch.cuda.device_count() < stages:
        pytest.skip(f"needs {stages} GPUs, one a pipeline stage")
    overrides = sort_chain_overrides(fp8, tmp_path, stages)
    command = [sys.executable, "tools/quickstart.py", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert summary["accuracy_before"] < 0.3
    assert summary["accuracy_after"] > LEARNT


@pytest.mark.parametrize("fp8", ["off", "blockwise"])
def test_a_step_at_real_width(fp8: str, one_rank: torch.device, tmp_path: Path) -> None:
    from benchmarks._card import free_memory
    from benchmarks._step_at_width import Load, Width, layers_that_fit, measure

    free_memory()
    width, load, free = Width(), Load(), torch.cuda.mem_get_info()[0]
    layers = layers_that_fit(free, width, load)
    row = measure(fp8, tmp_path, width, layers, load, 4, one_rank)
    assert math.isfinite(row.last_loss) and row.last_loss < row.first_loss
    assert row.tokens_a_second > 0 and row.peak_gib < free / 2**30
