"""Keeps the SGLang servers of one machine running: starts those again that end, or that the trainer
gave up, at their old address and with their old key, after pauses that grow.

Their addresses and keys, and how often each was started, are in one file with mode 600; the trainer
says in files beside it which it gave up. A server that never answered is not started again: what
keeps it from starting is the user's to mend.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prefix.config import RolloutConfig
from megatron_prefix.rollout.addresses import take_lost_report, write_endpoints
from megatron_prefix.rollout.client import SglangClient
from megatron_prefix.rollout.fleet import STEADY_S
from megatron_prefix.rollout.protocol import SglangError
from megatron_prefix.rollout.server import Server

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_LOOK_S = 1.0  # between two questions whether a server answers, and for its answer
# Start number ``index`` at a port (0: any that is free) with a key (empty: a new one).
Start = Callable[[int, int, str], Server]


@dataclass
class _Post:
    """A server's place."""

    server: Server
    started_at: float
    answered: bool = False
    served: bool = False  # at any start
    looked_at: float = 0.0
    restarts: int = 0  # in a row
    due_at: float = 0.0  # of its next start; 0: it runs
    given_up: bool = False


class Supervisor:
    """Call :meth:`poll` a few times a second. ``section`` of the recipe has their settings."""

    def __init__(self, start: Start, rollout: RolloutConfig, section: str = "rollout") -> None:
        self._start, self._rollout, self._section = start, rollout, section
        self._posts: list[_Post] = []
        self._file: Path | None = None

    @property
    def servers(self) -> Sequence[Server]:
        return [post.server for post in self._posts]

    def add(self) -> Server:
        """Start one more, and return at once."""
        server = self._start(len(self._posts), 0, "")
        self._posts.append(_Post(server, time.monotonic()))
        return server

    def publish(self, path: Path) -> None:
        """Write the servers' addresses and keys to ``path``, and keep it up to date."""
        self._file = path
        for post in self._posts:
            post.server.endpoint = replace(post.server.endpoint, source=str(path))
        write_endpoints(path, [server.endpoint for server in self.servers])

    def stop(self) -> None:
        """All at once, and then wait for each."""
        for server in self.servers:
            if server.exit_code() is None:
                server.process.terminate()
        for server in self.servers:
            server.stop()

    def poll(self) -> None:
        """Start what ended or was given up. Raises ServerFailed with a server's last words where
        one never answered, or where none is left."""
        for post in self._posts:
            if post.due_at and time.monotonic() >= post.due_at:
                self._start_again(post)
            elif not post.due_at and not post.given_up:
                self._examine(post)
        if self._posts and all(post.given_up for post in self._posts):
            self._posts[-1].server.raise_if_dead()

    def _examine(self, post: _Post) -> None:
        why = take_lost_report(self._file, post.server.endpoint) if self._file else ""
        if post.server.exit_code() is not None:
            self._plan_restart(post, "it ended")
        elif why:
            self._plan_restart(post, f"the trainer gave it up: {why}")
        elif not post.answered:
            self._look(post)

    def _look(self, post: _Post) -> None:
        now = time.monotonic()
        if now - post.looked_at < _LOOK_S:
            return
        post.looked_at = now
        with SglangClient(post.server.endpoint) as client:
            try:
                client.model_info(timeout_s=_LOOK_S, retries=0)
            except SglangError:
                if post.served and now - post.started_at > self._rollout.start_timeout_s:
                    setting = f"{self._section}.start_timeout_s"
                    self._plan_restart(post, f"it did not answer in {setting}")
                return
        if post.served:
            _say(f"the SGLang server at {post.server.url} answers again")
        post.answered = post.served = True

    def _plan_restart(self, post: _Post, why: str) -> None:
        post.server.stop()
        if not post.served:
            post.server.raise_if_dead()
        steady = time.monotonic() - post.started_at > STEADY_S
        post.restarts = 1 if steady else post.restarts + 1
        limit = self._rollout.server_restarts
        about = f"the SGLang server at {post.server.url} is gone ({why}; {post.server.log_path})"
        if post.restarts > limit:
            post.given_up = True
            _say(f"{about} and is not started again: {limit} restarts in a row did not help")
            self._write()
            return
        pause = min(_FIRST_PAUSE_S * 2.0 ** (post.restarts - 1), _LONGEST_PAUSE_S)
        post.due_at = time.monotonic() + pause
        _say(f"{about}; restart {post.restarts} of {limit} in a row comes in {pause:g} s")

    def _start_again(self, post: _Post) -> None:
        old = post.server.endpoint
        port = int(old.url.rpartition(":")[2])
        try:
            server = self._start(self._posts.index(post), port, old.api_key)
        except ValueError as error:  # somebody has its port now
            post.due_at = 0.0
            self._plan_restart(post, str(error))
            return
        server.endpoint = replace(server.endpoint, start=old.start + 1, source=old.source)
        post.server, post.started_at = server, time.monotonic()
        post.due_at, post.answered = 0.0, False
        self._write()

    def _write(self) -> None:
        """Where a file is wanted, and was not removed to end a lease."""
        if self._file is not None and self._file.exists():
            endpoints = [post.server.endpoint for post in self._posts if not post.given_up]
            write_endpoints(self._file, endpoints)


def _say(words: str) -> None:
    print(f"megatron-prefix: {words}", file=sys.stderr, flush=True)
