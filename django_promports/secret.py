"""The site secret: random bytes in the ledger folder, shared by the processes of one site and by no others.

With it they authenticate each other: probes and their answers (proof.py), and a child that asks its supervisor for the
port (presence.py). Processes that share no folder derive a key from the bearer token or SECRET_KEY;
conf.py decides which keys a process uses.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from functools import lru_cache
from pathlib import Path

from django_promports import unix

NAME = "site.secret"
LENGTH = 32
ROUNDS = 50_000


class BadSecret(Exception):
    """The file does not hold a secret that only this site can know."""


@lru_cache(maxsize=8)
def derive_key(text: bytes, purpose: str) -> bytes:
    """Return a key derived from a text, for processes that know the text but share no folder.

    A program that pretends to be an endpoint may record what is signed with the key and guess the text. The rounds
    (about 12 ms) slow down guesses at a short text; a random one is safe without them.
    """
    return hashlib.pbkdf2_hmac("sha256", text, f"django_promports {purpose}".encode(), ROUNDS)


def read_secret(folder: Path, *, foreign: bool = False) -> bytes | None:
    """Return the secret in the folder; None if there is none that can be trusted.

    foreign: if this process is root, also trust a folder of another user that no one else can have created.
    """
    if not unix.SUPPORTED:
        return None
    try:
        if foreign and os.geteuid() == 0 and not folder.parent.stat().st_mode & 0o022:
            return _read(folder, {0, folder.lstat().st_uid})
        return _read(folder, {os.geteuid()})
    except (OSError, BadSecret):
        return None


def make_secret(folder: Path) -> bytes | None:
    """Create the secret in a folder that belongs to this user, unless it exists; return it if this call created it.

    A file of this user that does not hold a secret is replaced. Raises OSError if the secret cannot be created.
    """
    path = folder / NAME
    is_bad = False
    try:
        _read(folder, {os.geteuid()})
        return None
    except FileNotFoundError:
        pass
    except (OSError, BadSecret) as error:
        if path.lstat().st_uid != os.geteuid():
            raise PermissionError(f"{path} belongs to another user ({error}); remove it") from None
        is_bad = True
    secret = os.urandom(LENGTH)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{NAME}.")
    try:
        with open(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        if not is_bad:
            try:
                os.link(temporary, path)
                return secret
            except FileExistsError:  # another process was faster
                return None
            except OSError:  # a file system without hard links: the last process to write wins
                pass
        os.replace(temporary, path)
        return secret
    finally:
        Path(temporary).unlink(missing_ok=True)


def remove_secret(folder: Path, secret: bytes) -> None:
    """Remove a secret that make_secret() created, unless it has been replaced since. Raises OSError."""
    if read_secret(folder) == secret:
        (folder / NAME).unlink(missing_ok=True)


def _read(folder: Path, owners: set[int]) -> bytes:
    """Return the secret. owners: the users who may own folder and file. Raises OSError or BadSecret."""
    at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(at)
        if status.st_uid not in owners or status.st_mode & 0o022:
            raise BadSecret("its folder belongs to another user, or others may write to it")
        # O_NONBLOCK: if the name is a FIFO, open() must not wait for a writer.
        file = os.open(NAME, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
    finally:
        os.close(at)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in owners or status.st_mode & 0o077:
            raise BadSecret("it is not a file that only this user can read")
        secret = os.read(file, LENGTH + 1)
    finally:
        os.close(file)
    if len(secret) != LENGTH or not any(secret):  # zeros: the machine crashed before the bytes were written
        raise BadSecret(f"it does not hold {LENGTH} bytes")
    return secret
