"""What the GPU benchmarks share: what was measured on, rows that may fail, their table and JSON."""

import gc
import importlib.metadata
import json
import subprocess
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

PACKAGES = ("transformer-engine", "triton", "megatron-core", "liger-kernel")
WORDS = 200  # characters of an error that a row shows; stderr has all of it
Cells = Mapping[str, object]


class Attempts:
    """Measures one thing after another; one that fails leaves its words and the next goes on."""

    def __init__(self) -> None:
        self.failed = 0

    def measure(self, call: Callable[[], Cells]) -> Cells:
        """What ``call`` measured, on a device that holds nothing of the call before; or its
        ``error``, where it raised or found no memory."""
        try:
            free_memory()
            return call()
        except Exception as error:
            words = told(error)
        self.failed += 1
        return {"error": words}


def told(error: Exception) -> str:
    """Name and first line of an error, whose trace goes to stderr; the frames are given up, for
    they hold what it had in memory."""
    traceback.print_exception(error)
    traceback.clear_frames(error.__traceback__)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])[:WORDS]


def free_memory() -> None:
    """Models hang together in circles (parameters, hooks, buffers) that only a collection ends."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.init()  # before it there are no statistics to reset
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def machine() -> dict[str, str]:
    """Of the first GPU that this process uses; what is not there is said to be not."""
    found = {"card": "none", "driver": _driver(), "cuda": torch.version.cuda or "none"}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(torch.cuda.current_device())
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        found["card"] = f"{card.name}, compute {card.major}.{card.minor}, {memory}"
    found["torch"] = torch.__version__
    return found | {name: _version(name) for name in PACKAGES}


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({type(error).__name__})"
    lines = asked.stdout.split()
    return lines[0] if asked.returncode == 0 and lines else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def markdown(rows: Sequence[Cells]) -> str:
    """A table with a column for each key of any row, in the order of the first that has it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[name.replace("_", " ") for name in names], ["---"] * len(names)]
    lines += [[_cell(row.get(name)) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.3f}"
    return str(value).replace("|", "\\|")


def report(title: str, rows: Sequence[Cells], file: Path | None) -> None:
    """Prints machine and table, fit for a page of the documentation; writes both as JSON."""
    here = machine()
    print(f"\n{title}: {', '.join(f'{name} {value}' for name, value in here.items())}\n")
    print(markdown(rows), flush=True)
    if file is not None:
        file.write_text(json.dumps({"machine": here, "rows": list(rows)}, indent=1) + "\n")
