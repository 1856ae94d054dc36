"""Adapts Megatron to the CPU before any test file imports it; a student and a teacher for many."""

import functools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_prefix.mcore.cpu import adapt_to_cpu
from tests.tiny_models import write_tiny_qwen3

adapt_to_cpu()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student of two layers, and a wider teacher."""
    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 62, "num_key_value_heads": 4}
    student = write_tiny_qwen3(root / "student", num_hidden_layers=2, **sizes)
    return student, write_tiny_qwen3(root / "teacher", hidden_size=96, seed=3, **sizes)


@pytest.fixture
def pythons_handlers() -> Iterator[None]:
    """Of the signals that end a tool: torch's launcher, which other tests start, leaves its own."""
    own = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def on_one_rank() -> Callable[[Any, int], Any]:
    """What :func:`world.train` gives on one rank, computed once for all layouts of a case."""
    from tests.distributed.ranks import run_ranks
    from tests.distributed.world import Case, Run, train

    @functools.cache
    def trained(case: Case, steps: int) -> Run:
        (run,) = run_ranks(1, train, case, 1, steps)
        return run

    return trained
