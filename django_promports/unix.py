"""What the package needs from the operating system: forks, users and file locks; whether it has them, and locking.

Where they are missing (Windows), every module still imports, no process claims a port, and checks.py reports it once.
"""

from __future__ import annotations

import os

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

NEEDED = ("fork", "geteuid", "pread", "pwrite", "register_at_fork")
# Decided here only. Where it is False, the other modules work without ports and ledgers.
SUPPORTED = fcntl is not None and all(hasattr(os, name) for name in NEEDED)


def lock_file(file: int) -> None:
    """Lock an open file until it is closed; flock(2). Raises BlockingIOError if another process has locked it."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
