"""What the package needs from the operating system: forks, users, file locks; whether it has them, and how to ask it.

Where they are missing (Windows), every module still imports, no process claims a port, and checks.py reports it once.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

try:
    import fcntl
    import termios
except ImportError:
    fcntl = None  # type: ignore[assignment]

NEEDED = ("fork", "geteuid", "pread", "pwrite", "register_at_fork")
# Decided here only. Where it is False, the other modules work without ports and ledgers.
SUPPORTED = fcntl is not None and all(hasattr(os, name) for name in NEEDED)


def lock_file(file: int) -> None:
    """Lock an open file until it is closed; flock(2). Raises BlockingIOError if another process has locked it."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def has_unsent(sock: socket.socket) -> bool:
    """Whether the kernel still has bytes for the peer; False where it cannot tell. Raises OSError."""
    if sys.platform != "linux":
        return False
    # man 7 tcp: SIOCOUTQ, which is TIOCOUTQ. The end of the stream counts as one byte.
    return bool(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0] > 1)
