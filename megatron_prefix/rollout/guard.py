"""Runs a command that dies with the process that started it. Run by path, before any import.

``guard.py PARENT_PID COMMAND...`` asks Linux for SIGKILL when its parent dies and becomes the
command: the request survives exec. A process of its own rather than Popen's ``preexec_fn``, which
runs Python between fork and exec and can deadlock in a parent that has threads, as torch has.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent_pid: int, command: list[str]) -> None:
    """Never returns: it becomes ``command``, or exits where the parent is gone already."""
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        sys.exit("prctl(PR_SET_PDEATHSIG) was refused")
    if os.getppid() != parent_pid:  # it died before prctl could see it
        sys.exit(f"the parent process {parent_pid} is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
