"""The SGLang servers of a run's teachers on one node, for trainers on other nodes. A Slurm step
runs it on each node that serves teachers, as ``rollout.serve`` on those that serve rollouts:

    python -m megatron_prefix.teachers.serve runs/NAME/recipe.yaml --peer NODE --endpoints-dir DIR

Each teacher with ``placement=server`` and no ``server.urls`` gets ``server.num_servers`` servers on
every such node. Their addresses and keys are in DIR/SECTION-INDEX.json, a lease as there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_prefix.config import Recipe
from megatron_prefix.modes import section_of, started_teachers
from megatron_prefix.rollout.serve import Group, serving
from megatron_prefix.rollout.server import LOOPBACK, Server, start_server
from megatron_prefix.rollout.supervisor import Supervisor
from megatron_prefix.teachers.served import server_settings


def main() -> int:
    """The exit code: 0 when the lease is over, 1 when a server could not start or ended."""
    return serving("megatron_prefix.teachers.serve", "The teachers' servers of one node.", _groups)


def teacher_supervisor(
    recipe: Recipe, domain: str, logs: str, *, host: str = LOOPBACK, first: int = 0
) -> Supervisor:
    """For the servers of a teacher on ``host``, none of which is started yet. Server I writes to
    ``logs``-I.log; ``first``: how many servers nodes before this one have, for their seeds."""
    teacher = started_teachers(recipe)[domain]
    settings = server_settings(recipe, teacher)

    def start(index: int, port: int, api_key: str) -> Server:
        return start_server(
            teacher.hf_path,
            settings,
            params_dtype=teacher.params_dtype,
            log_path=f"{logs}-{index}.log",
            index=index,
            port=port,
            seed=recipe.train.seed + first,
            host=host,
            api_key=api_key,
            first_gpu=teacher.server.first_gpu,
        )

    return Supervisor(start, settings, f"{section_of(domain)}.server")


def _groups(recipe: Recipe, host: str, node: int) -> Sequence[Group]:
    if not started_teachers(recipe):
        raise ValueError(
            "no teacher has placement=server and an empty server.urls: there is none to serve"
        )
    run, groups = Path(recipe.run.output_dir, recipe.run.name), []
    for domain, teacher in started_teachers(recipe).items():
        section, settings = section_of(domain), server_settings(recipe, teacher)
        supervisor = teacher_supervisor(
            recipe,
            domain,
            str(run / "logs" / f"{section}-servers-{node}" / "server"),
            host=host,
            first=node * settings.num_servers,
        )
        groups.append(Group(section, settings, supervisor))
    return groups


if __name__ == "__main__":
    sys.exit(main())
