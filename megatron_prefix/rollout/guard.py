"""Runs a command and lets nothing of it outlive the process that asked for it.

``guard.py PARENT_PID COMMAND...``, run by path as the leader of a session of its own. When the
command ends, or the parent does, however it does, the whole process group is killed, the guard
with it. SGLang's children ask the kernel to die with their parent, but only half a minute into
their start: until then, and for good where the parent dies before that, they would be orphans.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Relay:
    """Passes a SIGTERM on to the command, also one that comes while the command is started."""

    def __init__(self) -> None:
        self._told = False
        self._server: subprocess.Popen[bytes] | None = None

    def __call__(self, *_: object) -> None:
        self._told = True
        if self._server is not None:
            self._server.terminate()

    def start(self, server: subprocess.Popen[bytes]) -> None:
        self._server = server
        if self._told:
            server.terminate()


def die_with_guard() -> None:
    """For the command, in case that the guard itself is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(parent_pid: int, command: list[str]) -> None:
    """Returns never: the guard is in the group that it kills."""
    assert os.getpgrp() == os.getpid(), "the guard has to be started in a session of its own"
    parent = os.pidfd_open(parent_pid)
    if os.getppid() != parent_pid:  # it ended before it was watched
        sys.exit(f"the parent process {parent_pid} is gone")
    relay = Relay()
    signal.signal(signal.SIGTERM, relay)
    # One thread here, so that Python code between fork and exec cannot deadlock.
    server = subprocess.Popen(command, preexec_fn=die_with_guard)
    relay.start(server)
    events = select.poll()
    for process in (parent, os.pidfd_open(server.pid)):
        events.register(process, select.POLLIN)
    events.poll()
    code = server.poll()
    print("the parent process is gone" if code is None else f"exit code {code}", flush=True)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
