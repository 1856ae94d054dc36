"""Where a rank finds the servers of a run: in files that their starters leave, or in the recipe."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prefix.config import ModelConfig, Recipe
from megatron_prefix.modes import (
    check_own_servers,
    needs_servers,
    section_of,
    served_teachers,
    started_teachers,
)
from megatron_prefix.rollout.addresses import await_endpoints, read_endpoints, recipe_endpoints
from megatron_prefix.rollout.client import Endpoint
from megatron_prefix.rollout.serve import ROLLOUTS
from megatron_prefix.teachers.served import endpoints_file, server_settings


@dataclass(frozen=True)
class FoundServers:
    """Those that answer; a teacher's by its domain, for each teacher that is behind servers."""

    rollouts: list[Endpoint]
    teachers: dict[str, list[Endpoint]]


@dataclass(frozen=True)
class ServerFiles:
    """``rollouts``: a file, or a folder into which ``rollout_nodes`` nodes write one each once
    their servers answer; None: the recipe names them. ``teachers``: a folder with a file for each
    teacher, or, where ``teacher_nodes`` is not 0, into which so many nodes write one each."""

    rollouts: Path | None = None
    rollout_nodes: int = 1
    teachers: Path | None = None
    teacher_nodes: int = 0

    def check(self, recipe: Recipe) -> None:
        """ValueError where nobody starts the servers of a teacher, on every rank alike."""
        for domain in started_teachers(recipe) if self.teachers is None else ():
            raise ValueError(
                f"{section_of(domain)}.server.urls is empty, and nothing here starts a teacher's "
                "servers: name running ones, or give `megatron-prefix launch` "
                "--teacher-server-nodes"
            )

    def find(self, recipe: Recipe, should_stop: Callable[[], bool]) -> FoundServers | None:
        """None where ``should_stop`` says so before all answer. Raises ServerUnavailable where
        some do not in time."""
        rollouts = self._find_rollouts(recipe, should_stop)
        if rollouts is None:
            return None
        teachers = {}
        for domain, teacher in served_teachers(recipe).items():
            found = self._find_teacher(recipe, domain, teacher, should_stop)
            if found is None:
                return None
            settings = f"{section_of(domain)}.server"
            teachers[domain] = [replace(each, settings=settings) for each in found]
        return FoundServers(rollouts, teachers)

    def _find_rollouts(
        self, recipe: Recipe, should_stop: Callable[[], bool]
    ) -> list[Endpoint] | None:
        if not needs_servers(recipe):
            return []
        found: list[Endpoint] | None
        if self.rollouts is None:
            found = recipe_endpoints(recipe.rollout)
        elif self.rollouts.is_dir():
            limit = recipe.rollout.start_timeout_s
            found = await_endpoints(self.rollouts, ROLLOUTS, self.rollout_nodes, limit, should_stop)
        else:
            found = read_endpoints(self.rollouts)
        if found is not None:
            check_own_servers(recipe, len(found))
        return found

    def _find_teacher(
        self, recipe: Recipe, domain: str, teacher: ModelConfig, should_stop: Callable[[], bool]
    ) -> list[Endpoint] | None:
        if teacher.server.urls:
            return recipe_endpoints(server_settings(recipe, teacher))
        assert self.teachers is not None, "checked"
        if not self.teacher_nodes:
            return read_endpoints(endpoints_file(self.teachers, domain))
        return await_endpoints(
            self.teachers,
            section_of(domain),
            self.teacher_nodes,
            teacher.server.start_timeout_s,
            should_stop,
            section=f"{section_of(domain)}.server",
        )


def longest_look_s(recipe: Recipe) -> float:
    """How long :meth:`ServerFiles.find` may take."""
    teachers = served_teachers(recipe).values()
    return recipe.rollout.start_timeout_s + sum(t.server.start_timeout_s for t in teachers)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endpoints", type=Path, help="JSON of the servers' addresses and keys, or a folder of it"
    )
    parser.add_argument(
        "--endpoint-files", type=int, default=1, metavar="N", help="to wait for in that folder"
    )
    parser.add_argument(
        "--teacher-endpoints", type=Path, help="a folder of JSON, of the servers started for each"
    )
    parser.add_argument(
        "--teacher-endpoint-files",
        type=int,
        default=0,
        metavar="N",
        help="to wait for there, of each teacher; 0: one, which is there",
    )


def servers_of(arguments: argparse.Namespace) -> ServerFiles:
    """What :func:`add_server_arguments` was given."""
    return ServerFiles(
        arguments.endpoints,
        arguments.endpoint_files,
        arguments.teacher_endpoints,
        arguments.teacher_endpoint_files,
    )
