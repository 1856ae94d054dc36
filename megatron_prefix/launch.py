"""Submits a run through nemo-run, and is the only file that imports it.

Its batch script is given numbers and checked words alone: it does not quote the rest. All values
of the recipe and of the user go into the steps' own scripts, which ``jobs/cluster.py`` writes
(docs/decisions/0005-slurm.md).
"""

import contextlib
import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prefix.config import Recipe
from megatron_prefix.exit_codes import DONE, FAILED
from megatron_prefix.jobs.cluster import (
    Cluster,
    quote,
    server_script,
    setup_lines,
    step_cpus,
    trainer_script,
)
from megatron_prefix.jobs.starts import LocalStart, note_slurm_job, read_starts

if TYPE_CHECKING:
    import nemo_run

_JOB_NAMES = "megatron-prefix."
_UNQUOTED = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_MONITOR_S = 5  # between two looks at the steps
_DRY = "DRYRUN"
_LOOK_S = 0.1  # between two looks at a process that starts


def launch(record: Path, recipe: Recipe, cluster: Cluster, *, detach: bool = False) -> int:
    """Submit the run whose resolved recipe is at ``record``; ``detach``: without waiting for it.

    Returns 0, or 1 where it was seen to fail; ValueError with sbatch's words where it takes no such
    job. Steps run from the current folder, which has to be
    there on every node, as the run folder has.
    """
    if detach and cluster.executor == "local":  # nemo-run's ends with the process that started it
        return _start_here(record, cluster)
    from invoke.exceptions import UnexpectedExit
    from nemo_run.config import get_nemorun_home
    from torchx.specs.api import AppState

    with _experiment(record, recipe, cluster, Path(get_nemorun_home())) as experiment:
        try:
            experiment.run(detach=detach, tail_logs=not detach)
        except UnexpectedExit as error:
            raise ValueError(f"the job was not taken: {error.result.stderr}") from error
        if cluster.executor == "slurm":
            _note(record.parent, experiment)
    if detach:
        return DONE
    ended_well = all(job.state == AppState.SUCCEEDED for job in experiment.jobs)
    return DONE if ended_well else FAILED


def _note(folder: Path, experiment: "nemo_run.Experiment") -> None:
    """The job's number, and where its steps' output will be."""
    for job in experiment.jobs:
        number = int(job.handle.rpartition("/")[2])
        logs = job.executor.job_dir if hasattr(job, "executor") else job.executors[0].job_dir
        note_slurm_job(folder, number, logs)
        print(f"job {number}: megatron-prefix status|logs|cancel {quote(folder)}", flush=True)


def _start_here(record: Path, cluster: Cluster) -> int:
    """In a session of its own, once it is known to the run folder; its exit code where it ended
    before that."""
    folder = record.parent
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    number = itertools.count(len(list(logs.glob("local-*.out"))))  # one may have been deleted
    output = next(path for n in number if not (path := logs / f"local-{n}.out").exists())
    with output.open("xb") as file:
        process = subprocess.Popen(
            ["bash", "-s"],  # a script's words would be seen by all on this machine
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    assert process.stdin is not None
    with process.stdin as pipe:
        pipe.write(trainer_script(cluster, record, Path.cwd()).encode())
    while not any(isinstance(s, LocalStart) and s.pid == process.pid for s in read_starts(folder)):
        if process.poll() is not None:
            sys.stderr.write(output.read_text(encoding="utf-8", errors="replace"))
            return process.returncode
        time.sleep(_LOOK_S)
    print(f"process {process.pid}: megatron-prefix status|logs|cancel {quote(folder)}", flush=True)
    return DONE


def dry_run(record: Path, recipe: Recipe, cluster: Cluster) -> str:
    """The scripts that :func:`launch` would submit, with the names that they would have."""
    from nemo_run.config import get_nemorun_home

    with tempfile.TemporaryDirectory() as folder:
        with _experiment(record, recipe, cluster, Path(folder), _DRY) as experiment:
            experiment.dryrun(log=False, delete_exp_dir=False)
        found = sorted(Path(folder).rglob("*_sbatch.sh"))
        found += sorted(Path(folder).rglob("scripts/*.sh"))
        texts = [f"# ==> {path} <==\n{path.read_text().rstrip()}\n" for path in found]
    return "\n".join(texts).replace(folder, get_nemorun_home())


@contextlib.contextmanager
def _experiment(
    record: Path, recipe: Recipe, cluster: Cluster, home: Path, number: str = ""
) -> "Iterator[nemo_run.Experiment]":
    """With the run as its one job; leaving the block waits for what was launched in it."""
    import nemo_run

    if not _UNQUOTED.fullmatch(str(home)):
        raise ValueError(
            f"NEMORUN_HOME={home} has characters that nemo-run does not quote; set another folder"
        )
    title = re.sub(r"[^A-Za-z0-9-]+", "-", recipe.run.name)
    with nemo_run.Experiment(
        title,
        id=f"{title}_{number}" if number else None,
        base_dir=str(home),
        log_level="WARN",
        clean_mode=bool(number),
        skip_status_at_exit=True,
        enable_goodbye_message=False,  # of commands that know no attempt and no run folder
        serialize_metadata_for_scripts=False,
    ) as experiment:
        _add_job(experiment, title, record, cluster, home)
        yield experiment


def _add_job(
    experiment: "nemo_run.Experiment", name: str, record: Path, cluster: Cluster, home: Path
) -> None:
    import nemo_run

    trainer = nemo_run.Script(inline=trainer_script(cluster, record, Path.cwd()))
    if cluster.executor == "local":
        experiment.add(trainer, executor=nemo_run.LocalExecutor(), name=name)
    elif not cluster.serving_nodes:
        executor = _slurm(record, cluster, home, cluster.nodes, first=0)
        experiment.add(trainer, executor=executor, name=name)
    else:
        scripts, executors = [trainer], [_step(record, cluster, home, 0, cluster.trainer_nodes, 0)]
        first = cluster.trainer_nodes
        for nodes, teachers in (
            (cluster.server_nodes, False),
            (cluster.teacher_server_nodes, True),
        ):
            if nodes:
                text = server_script(cluster, record, Path.cwd(), teachers=teachers)
                executors.append(_step(record, cluster, home, len(scripts), nodes, first))
                scripts.append(nemo_run.Script(inline=text))
                first += nodes
        experiment.add(scripts, executor=executors, name=name)


def _step(
    record: Path, cluster: Cluster, home: Path, group: int, nodes: int, first: int
) -> "nemo_run.SlurmExecutor":
    """Step ``group`` of the job, on ``nodes`` of its nodes or on the group of that number."""
    executor = _slurm(record, cluster, home, nodes, first=first)
    if not cluster.heterogeneous:
        return executor
    gpus = cluster.server_gpus_per_node if group else 0
    return _in_group(executor, group, nodes, gpus or cluster.gpus_per_node)


def _in_group(
    executor: "nemo_run.SlurmExecutor", group: int, nodes: int, gpus: int
) -> "nemo_run.SlurmExecutor":
    """The step on a group of the job's own, which has those nodes and no others."""
    srun_args = [word for word in executor.srun_args or () if not word.startswith("--relative")]
    return dataclasses.replace(
        executor,
        heterogeneous=True,
        nodes=nodes,
        gpus_per_node=gpus or None,
        srun_args=[*srun_args, step_cpus(group)],
    )


def _slurm(
    record: Path, cluster: Cluster, home: Path, step_nodes: int, *, first: int
) -> "nemo_run.SlurmExecutor":
    """A step on ``step_nodes`` of the job's nodes, counted from ``first``."""
    import nemo_run

    return nemo_run.SlurmExecutor(
        account=cluster.account or None,
        partition=cluster.partition or None,
        time=cluster.time,
        nodes=cluster.nodes,
        ntasks_per_node=1,
        gpus_per_node=cluster.gpus_per_node or None,
        exclusive=True,
        signal=f"USR1@{cluster.signal_before_s}",
        additional_parameters={"dependency": "singleton"} if cluster.singleton else None,
        # nemo-run means to quote these and does not: its `noquote` is another name for str.
        container_image=quote(cluster.container) if cluster.container else None,
        container_mounts=list(map(quote, cluster.mounts)),
        # The ranks of a node that ends with 75 first must not take the others' 75 from them.
        srun_args=["--kill-on-bad-exit=0", f"--nodes={step_nodes}", f"--ntasks={step_nodes}"]
        + [f"--relative={first}", "--label"],
        job_name_prefix=_JOB_NAMES,
        setup_lines=setup_lines(record, cluster),
        tunnel=nemo_run.LocalTunnel(job_dir=str(home / "experiments")),
        packager=nemo_run.Packager(),  # the environment is there; no code is sent along
        retries=0,  # nemo-run would requeue after any failure
        wait_time_for_group_job=0,
        monitor_group_job_wait_time=_MONITOR_S,
        poll_estimated_start_time=False,
    )
