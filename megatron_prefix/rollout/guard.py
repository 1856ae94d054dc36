"""Runs a command and lets nothing of it outlive the process that asked for it.

``guard.py [--hide FILE] PARENT_PID COMMAND...``, run by path as the leader of a session of its
own. When the command ends, or the parent does, however it does, the whole process group is killed,
the guard with it. SGLang's children ask the kernel to die with their parent, but only half a minute
into their start: until then, and for good where the parent dies before that, they would be orphans.

With ``--hide`` the values of FILE, a JSON object, are left out of what the command prints: SGLang
logs all of its settings, the key with them.
"""

import contextlib
import ctypes
import functools
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence

PR_SET_PDEATHSIG = 1  # linux/prctl.h
HIDDEN = b"(hidden)"
_CHUNK = 2**16


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


class Veil:
    """Copies a command's output to our own, line by line, without the secrets in it."""

    def __init__(self, secrets: Sequence[bytes], source: int) -> None:
        self._secrets, self._held = secrets, b""
        self.source = source
        os.set_blocking(source, False)

    def copy(self) -> bool:
        """Copy all that can be read now; False at the end of the output."""
        while True:
            try:
                chunk = os.read(self.source, _CHUNK)
            except BlockingIOError:
                return True
            if not chunk:
                self._flush()
                return False
            text = self._held + chunk
            # A secret holds no end of a line, so none is cut in two.
            end = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
            self._held = text[end:]
            self._write(text[:end])

    def finish(self) -> None:
        if self.copy():  # a child of the command's has the pipe too, and is about to be killed
            self._flush()

    def _flush(self) -> None:
        self._write(self._held)
        self._held = b""

    def _write(self, text: bytes) -> None:
        for secret in self._secrets:
            text = text.replace(secret, HIDDEN)
        with contextlib.suppress(OSError):  # a full disk costs the log, not the server
            while text:
                text = text[os.write(1, text) :]


def die_with_guard(guard: int) -> None:
    """For the command, in case that the guard itself is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guard:  # it was killed before the kernel was asked
        os._exit(1)


def main(parent_pid: int, command: list[str], secrets: Sequence[bytes] = ()) -> None:
    """Run ``command`` as a child, and kill the whole process group when it or the parent ends.

    Never returns, since the guard is in that group. ``secrets`` are hidden in what it prints.
    """
    assert os.getpgrp() == os.getpid(), "the guard has to be started in a session of its own"
    parent = os.pidfd_open(parent_pid)
    if os.getppid() != parent_pid:  # it ended before it was watched
        sys.exit(f"the parent process {parent_pid} is gone")
    relay = Relay()
    signal.signal(signal.SIGTERM, relay)
    # One thread here, so that Python code between fork and exec cannot deadlock.
    shown = subprocess.PIPE if secrets else None
    server = subprocess.Popen(
        command,
        preexec_fn=functools.partial(die_with_guard, os.getpid()),
        stdout=shown,
        stderr=subprocess.STDOUT if shown else None,
    )
    relay.start(server)
    veil = Veil(secrets, server.stdout.fileno()) if server.stdout else None
    _await_an_end((parent, os.pidfd_open(server.pid)), veil)
    code = server.poll()
    with contextlib.suppress(OSError):
        print("the parent process is gone" if code is None else f"exit code {code}", flush=True)
    os.killpg(0, signal.SIGKILL)


def _await_an_end(processes: Sequence[int], veil: Veil | None) -> None:
    """Of one of ``processes``, by their pidfds; what the command prints is copied meanwhile."""
    events = select.poll()
    for process in processes:
        events.register(process, select.POLLIN)
    if veil:
        events.register(veil.source, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in events.poll()]
        if veil and veil.source in ready and not veil.copy():
            events.unregister(veil.source)
        if any(process in ready for process in processes):
            break
    if veil:
        veil.finish()


def hidden_values(file: str) -> list[bytes]:
    with open(file, encoding="utf-8") as handle:
        return [value.encode() for value in json.load(handle).values()]


if __name__ == "__main__":
    words = sys.argv[1:]
    hidden = hidden_values(words[1]) if words[0] == "--hide" else []
    words = words[2:] if hidden else words
    main(int(words[0]), words[1:], hidden)
