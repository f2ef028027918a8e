"""Processes of this machine: which one it is, when it started, and whether it still runs. See man 5 proc.

A pid alone names a process only while it runs, and only in its pid namespace.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

# Where the start of a process is not known, that of this module stands for it.
LOADED_AT = time.time()


class Identity(NamedTuple):
    """A process: its pid, its start in clock ticks since the boot, and its pid namespace; each is 0 where unknown."""

    pid: int
    started: int
    namespace: int


def identify() -> Identity:
    """Return which process this is."""
    try:
        return Identity(os.getpid(), int(read_stat("self")[19]), _read_namespace())
    except (OSError, ValueError, LookupError):
        return Identity(os.getpid(), 0, 0)


def is_running(process: Identity) -> bool | None:
    """Return whether a process still runs; None if it cannot be seen from here, as in another container."""
    if not process.pid:
        return None
    if not process.started:
        return _has_pid(process.pid)
    try:
        if process.namespace != _read_namespace():
            return None
        fields = read_stat(process.pid)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    return fields[0] not in "ZX" and int(fields[19]) == process.started


def find_start() -> float:
    """Return when this process started, in seconds of time.time()."""
    try:
        ticks = int(read_stat("self")[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, LookupError, AttributeError):
        return LOADED_AT


def read_stat(pid: int | str) -> list[str]:
    """Return the fields of /proc/<pid>/stat after the name, which may contain parentheses. Raises OSError."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _read_namespace() -> int:
    return os.stat("/proc/self/ns/pid").st_ino


def _has_pid(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
