"""The folder that ledgers are in: where it is, made for one user only, and refused where others might write to it."""

from __future__ import annotations

import glob
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger("django_promports")

SHARED_MEMORY = Path("/dev/shm")
# The first user who is not a system user, for systemd-logind.
FIRST_REGULAR_USER = 1000
SYSTEMD = "/run/systemd/system"


class ForeignFolder(PermissionError):
    """The folder belongs to another user."""


def name_folder(site: str) -> str:
    """Return the name of the default folder of a site."""
    return f"django_promports-{os.geteuid()}-" + re.sub(r"[/\0]", "_", site)


def find_default(site: str, project: str) -> Path:
    """Return the path of the default folder of a site. Raises OSError if no folder can be made anywhere.

    A folder that version 0.1 made in the temporary directory, under the name of the project, stays there.
    make_folder() gives it its new name.
    """
    folder = find_base() / name_folder(site)
    with suppress(OSError):
        temporary = Path(tempfile.gettempdir())
        if not _is_own(folder) and any(_is_own(temporary / name_folder(name)) for name in (site, project)):
            return temporary / folder.name
    return folder


def find_siblings(folder: Path, project: str) -> list[Path]:
    """Return the default folders of this user's sites with this settings module, that are next to this one."""
    pattern = f"{glob.escape(name_folder(project))}-{'[0-9a-f]' * 8}"
    return sorted(folder.parent.glob(pattern))


def find_base() -> Path:
    """Return the folder in which default folders are: of systemd, in memory, or the temporary directory.

    Raises OSError if there is none.
    """
    # https://www.freedesktop.org/software/systemd/man/latest/systemd.exec.html#RuntimeDirectory=
    runtime = os.environ.get("RUNTIME_DIRECTORY", "").partition(":")[0]
    if os.path.isabs(runtime) and _is_usable_base(Path(runtime)):
        return Path(runtime)
    # When a regular user logs out, systemd-logind removes all that the user has in /dev/shm (RemoveIPC=).
    if (os.geteuid() < FIRST_REGULAR_USER or not os.path.isdir(SYSTEMD)) and _is_usable_base(SHARED_MEMORY):
        return SHARED_MEMORY
    return Path(tempfile.gettempdir())


def _is_usable_base(path: Path) -> bool:
    """Whether this process can make a folder here that no other user can replace."""
    try:
        status = path.stat()
    except OSError:
        return False
    is_safe = status.st_mode & stat.S_ISVTX or status.st_uid == os.geteuid()
    return stat.S_ISDIR(status.st_mode) and bool(is_safe) and os.access(path, os.W_OK | os.X_OK)


def identify(path: Path | None) -> str:
    """Return device and inode of a folder, by which processes of one machine recognise it; empty if there is none."""
    try:
        status = path.stat() if path else None
    except OSError:
        return ""
    return f"{status.st_dev}:{status.st_ino}" if status else ""


def make_folder(path: Path, former: Iterable[Path] = ()) -> bool:
    """Make the folder of the ledgers, for this user only; False if it was there already.

    former: folders of which the first that exists becomes this one, if there is none. Raises OSError if it cannot be
    made, PermissionError if it is a link, or another user's, or others may write to it.
    """
    for other in () if os.path.lexists(path) else former:
        if _is_own(other):
            with suppress(OSError):  # another process was faster
                os.rename(other, path)
                logger.info("Renamed the ledger folder %s to %s.", other, path.name)
                break
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


def _is_own(path: Path) -> bool:
    try:
        check_folder(path)
    except OSError:
        return False
    return True


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
