"""Runs a command that the kernel kills when the process that started it dies, however it dies.

``python -P die_with_parent.py PARENT_PID COMMAND...``. The request survives exec, so the command
takes this process's place and its exit code is the command's own. (``rollout/guard.py`` serves
commands with children of their own, which need a living guard.) Popen's ``preexec_fn`` would run
Python between fork and exec and can deadlock in a parent that has threads.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main(parent_pid: int, command: list[str]) -> None:
    """Becomes ``command``, or exits where the parent is gone already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it ended before the kernel was asked
        sys.exit(f"the parent process {parent_pid} is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
