"""The folder that ledgers are in: made for one user only, and refused where others might write to it."""

from __future__ import annotations

import os
import stat
from pathlib import Path


class ForeignFolder(PermissionError):
    """The folder belongs to another user."""


def make_folder(path: Path) -> bool:
    """Make the folder of the ledgers, for this user only; False if it was there already.

    Raises OSError if it cannot be made, PermissionError if it is a link, or another user's, or others may write to it.
    """
    try:
        path.mkdir(mode=0o700, parents=True)
        return True
    except FileExistsError:
        check_folder(path)
        return False


def check_folder(path: Path) -> None:
    """Raise PermissionError if this folder is not safe for ledgers, ForeignFolder if it is another user's."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise PermissionError(f"{path} is a symbolic link, or not a folder")
    if status.st_mode & 0o022:
        raise PermissionError(f"others may write to {path}")
    if status.st_uid != os.geteuid():
        raise ForeignFolder(f"{path} belongs to user {status.st_uid}, not to {os.geteuid()}, the user of this process")


def find_filesystem(path: Path) -> str:
    """Return the type of the file system that the path, or its nearest parent, is on; "" where that is unknown."""
    while not path.exists():
        path = path.parent
    device = path.stat().st_dev
    try:
        # man 5 proc: the third field is the device, the one after " - " the type.
        for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
            if line.split()[2] == f"{os.major(device)}:{os.minor(device)}":
                return line.partition(" - ")[2].split()[0]
    except OSError:
        pass
    return ""
