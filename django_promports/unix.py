"""What the package needs of the operating system: forks, users and file locks, as every Unix has them.

Where they are missing (Windows), every module imports, no process claims a port, and checks.py says so once.
"""

from __future__ import annotations

import os

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

NEEDED = ("fork", "geteuid", "pread", "pwrite", "register_at_fork")
# The one place that decides it. Whoever asks works without ports and ledgers where this is False.
SUPPORTED = fcntl is not None and all(hasattr(os, name) for name in NEEDED)


def lock_file(file: int) -> None:
    """Lock an open file until it is closed; flock(2). Raises BlockingIOError if another process has locked it."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
