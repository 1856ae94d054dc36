"""What this machine has, which engine and precision it can run, and how to mend what is missing."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_prefix.config import Fp8Config

State = Literal["ok", "missing", "absent"]  # absent: not here, and not needed for the CPU path

DISTRIBUTION = "megatron-prefix"
ALWAYS_SHOWN = ("torch", "megatron-core", "sglang", "transformers", "datasets", "nemo-run")
GPU_EXTRA = (
    "on a GPU, with nvcc: .tools/bin/uv pip install --no-build-isolation-package "
    "transformer-engine-torch -e '.[gpu]'"
)
COMPILERS = ("c++", "g++", "clang++")
SLURM = ("sbatch", "srun", "scontrol", "sacct")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked for."""

    name: str
    state: State
    found: str
    remedy: str = ""  # what to type, or what it is good for where nothing mends it


@dataclass(frozen=True)
class Findings:
    findings: tuple[Finding, ...]
    engine: str
    precisions: tuple[str, ...]
    fp8_recipes: tuple[str, ...]

    @property
    def cpu_path(self) -> bool:
        """Whether everything is here that the main job needs on a CPU."""
        return all(finding.state != "missing" for finding in self.findings)


def examine() -> Findings:
    """Looks at this machine. Imports torch; starts nothing and changes nothing."""
    packages = [_python(), *_packages(), *_conflicts()]
    if any(f.name == "torch" and f.state == "missing" for f in packages):
        return Findings((*packages, *_commands()), "none: torch is missing", (), ())
    cards, transformer_engine = _cards(), _transformer_engine()
    recipes = _fp8_recipes()
    return Findings(
        findings=(*packages, *_collectives(), *cards, transformer_engine, *_commands()),
        engine=_engine(transformer_engine),
        precisions=("fp32", "bf16", *(["fp8"] if recipes else [])),
        fp8_recipes=recipes,
    )


def node_problems(findings: Findings, folder: Path, gpus: int) -> list[str]:
    """Why a run that lives in ``folder``, with a rank on each of ``gpus`` GPUs (0: on none), cannot
    run on this machine; each in one line."""
    problems = [
        f"{finding.name}: {finding.found} ({finding.remedy})"
        for finding in findings.findings
        if finding.state == "missing"
    ]
    found = sum(f.name.startswith("gpu ") for f in findings.findings)
    if found < gpus:
        problems.append(f"{found} GPUs that torch can use, {gpus} wanted")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problems.append(f"{folder}, the run's folder, cannot be written to: {error.strerror}")
    return problems


def findings_json(findings: Findings) -> str:
    return json.dumps(asdict(findings) | {"cpu_path": findings.cpu_path}, indent=2)


def print_findings(findings: Findings, console: Console) -> None:
    table = Table(title="This machine", title_justify="left")
    for column in ("", "", "found"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "missing": "red", "absent": "yellow"}
    for finding in findings.findings:
        state = Text(finding.state, style=colours[finding.state])
        table.add_row(finding.name, state, Text(finding.found))
    console.print(table)
    for finding in findings.findings:
        if finding.remedy:  # a line each, to be copied; its brackets are no markup
            words = f"{finding.name}: {finding.remedy}"
            console.print(words, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Engine: {findings.engine}")
    console.print(f"Precisions: {', '.join(findings.precisions) or 'none'}")
    console.print(f"FP8 recipes: {', '.join(findings.fp8_recipes) or 'none on this machine'}")
    answer = "can" if findings.cpu_path else "cannot yet"
    console.print(f"This machine {answer} run the main job on its CPU.")


def _python() -> Finding:
    version = platform.python_version()
    cores = f"{version}, {os.cpu_count()} cores, {platform.machine()}"
    if sys.version_info[:2] != (3, 12):
        return Finding("python", "missing", cores, "make env builds .venv with Python 3.12")
    if sys.flags.dont_write_bytecode:
        slow = "unset PYTHONDONTWRITEBYTECODE: every start compiles torch and SGLang anew"
        return Finding("python", "ok", cores, slow)
    return Finding("python", "ok", cores)


def _packages() -> list[Finding]:
    """Those that everyone asks about, and whichever other is missing or of a wrong version."""
    try:
        wanted = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return [Finding(DISTRIBUTION, "missing", "not installed", "make env")]
    found = [
        _package(requirement)
        for requirement in map(Requirement, wanted)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    return [f for f in found if f.name in ALWAYS_SHOWN or f.state != "ok"]


def _package(wanted: Requirement) -> Finding:
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(wanted.name, "missing", f"not installed; wanted {wanted}", "make env")
    if not wanted.specifier.contains(version, prereleases=True):
        return Finding(wanted.name, "missing", f"{version}; wanted {wanted}", "make env")
    return Finding(wanted.name, "ok", version)


def _conflicts() -> list[Finding]:
    """Packages that break another one by being there."""
    if importlib.util.find_spec("nvidia_resiliency_ext") is None:
        return []
    return [
        Finding(
            "nvidia-resiliency-ext",
            "missing",
            "installed, and SGLang's server does not start beside it",
            "uv pip uninstall nvidia-resiliency-ext",
        )
    ]


def _collectives() -> list[Finding]:
    import torch.distributed as dist

    gloo, nccl = dist.is_available() and dist.is_gloo_available(), dist.is_nccl_available()
    return [
        Finding("gloo", "ok" if gloo else "missing", _yes(gloo), "" if gloo else "make env"),
        Finding("nccl", "ok" if nccl else "absent", _yes(nccl), "" if nccl else "for GPUs only"),
    ]


def _cards() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda
        found = f"no GPU that torch can use (torch is built for CUDA {built or 'not at all'})"
        return [Finding("gpu", "absent", found, "the CPU path needs none")]
    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 1024**3:.0f} GiB"
        found = (
            f"{card.name}, compute {card.major}.{card.minor}, {memory}, CUDA {torch.version.cuda}"
        )
        cards.append(Finding(f"gpu {index}", "ok", found))
    return cards


def _transformer_engine() -> Finding:
    """Importable is not usable: without a GPU it imports, and its layers raise."""
    import torch

    name = "transformer-engine"
    if importlib.util.find_spec("transformer_engine") is None:
        return Finding(name, "absent", "not installed", GPU_EXTRA)
    version = importlib.metadata.version(name)
    if not torch.cuda.is_available():
        return Finding(name, "absent", f"{version}, of no use without a GPU")
    # In a process of its own: built against another torch it may end the interpreter.
    probe = (
        "import torch, transformer_engine.pytorch as te\n"
        "te.Linear(16, 16)(torch.ones(16, 16, device='cuda'))"
    )
    tried = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if tried.returncode:
        told = (tried.stderr.strip().splitlines() or [f"exit code {tried.returncode}"])[-1]
        return Finding(name, "absent", f"{version}, fails: {told}", GPU_EXTRA)
    return Finding(name, "ok", f"{version}, usable")


def _fp8_recipes() -> tuple[str, ...]:
    from megatron_prefix.mcore.fp8 import BLACKWELL_ONLY, RECIPES, refuse_machine

    def runs(recipe: str) -> bool:
        try:
            refuse_machine(Fp8Config("e4m3", recipe, first_last_layers_bf16=False), "student")
        except ValueError:
            return False
        return True

    return tuple(recipe for recipe in (*RECIPES, *BLACKWELL_ONLY) if runs(recipe))


def _engine(transformer_engine: Finding) -> str:
    import torch

    if not torch.cuda.is_available():
        return "CPU: gloo, Megatron-Core with this package's own norm and attention"
    if transformer_engine.state == "ok":
        return "GPU: NCCL, Megatron-Core with Transformer Engine"
    return "GPU: NCCL, Megatron-Core with this package's own norm and attention"


def _commands() -> list[Finding]:
    chosen = os.environ.get("CXX", "")
    names = (chosen, *COMPILERS) if chosen else COMPILERS
    compiler = next((path for path in map(shutil.which, names) if path), "")
    slurm = [name for name in SLURM if shutil.which(name)]
    lacking = [name for name in SLURM if name not in slurm]
    return [
        Finding("C++ compiler", "ok", compiler)
        if compiler
        else Finding("C++ compiler", "absent", "none", "apt-get install g++: a faster loss"),
        Finding("slurm", "ok", ", ".join(slurm))
        if not lacking
        else Finding("slurm", "absent", f"without {', '.join(lacking)}", "for clusters only"),
    ]


def _yes(there: bool) -> str:
    return "built into torch" if there else "not built into torch"
