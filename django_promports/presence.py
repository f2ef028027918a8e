"""Presence: which processes of this machine wait for a port, and asking others of the site for theirs.

A supervisor is asked to step down from its port, and an heir to hand one over. All of it uses abstract unix sockets,
without files and without requests to a port. Like a port, such a socket belongs to the network namespace and ends with
its process. Only Linux has them. Elsewhere no process is counted as waiting, a supervisor that spawns its workers keeps
its port, and a process that needs a port does not get that of an heir.
"""

from __future__ import annotations

import hmac
import os
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from django_promports.processes import read_stat


def announce_waiting(ports: Sequence[int]) -> socket.socket | None:
    """Count this process as waiting for one of the ports until the returned socket is closed. Linux only."""
    return _bind_sign(socket.SOCK_DGRAM, f"\0{_waiting_name(ports)}{os.getpid()}")


def count_waiting(ports: Sequence[int]) -> int:
    """Return how many processes wait for one of these ports."""
    # man 5 proc: /proc/net/unix shows the leading NUL of an abstract name as "@".
    try:
        table = Path("/proc/net/unix").read_text(errors="replace")
    except OSError:
        return 0
    return table.count(f" @{_waiting_name(ports)}")


def open_step_down(key: bytes) -> socket.socket | None:
    """Open the step-down socket, where a child asks this process to free its port: relieve_parent(). Linux only.

    Its name is derived from a key of the site, so no other user can bind it first.
    """
    name = _step_down_name(key, os.getpid())
    return _bind_sign(socket.SOCK_STREAM, name) if name else None


def is_child(peer: socket.socket) -> bool:
    """Return whether the process that connected to the step-down socket is a child of this one."""
    try:
        # The parent's pid is the second field after the name.
        return int(read_stat(_peer(peer)[0])[1]) == os.getpid()
    except OSError:  # the process has ended
        return False


def relieve_parent(key: bytes, seconds: float) -> None:
    """Ask the parent to free its port, if it has a step-down socket, and wait up to `seconds` until it has done so."""
    parent = os.getppid()
    name = _step_down_name(key, parent)
    if not name:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.setblocking(False)  # only a verified parent may make this process wait
            sock.connect(name)
            pid, user = _peer(sock)
            if pid == parent and user in (0, os.geteuid()):
                sock.settimeout(seconds)
                sock.recv(1)  # the parent sends nothing, and closes the connection when its port is free
        except OSError:
            pass


def open_hand_over(key: bytes, port: int) -> socket.socket | None:
    """Open the socket where a process of the site asks this one for a port: take_over(). Linux only."""
    return _bind_sign(socket.SOCK_STREAM, _hand_over_name(key, port)) if sys.platform == "linux" else None


def take_over(key: bytes, port: int, seconds: float, silent: set[int]) -> tuple[socket.socket, int] | None:
    """Ask for a port and return what its heir sends: the listening socket, and the ledger, locked; None without one.

    seconds: to wait for the answer. silent: pids of heirs that did not answer in time; they are not asked again.
    """
    if sys.platform != "linux":
        return None
    files: list[int] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        pid = 0
        try:
            sock.setblocking(False)
            sock.connect(_hand_over_name(key, port))
            pid, user = _peer(sock)
            if user != os.geteuid() or pid in silent:
                return None
            sock.settimeout(seconds)
            _, files, _, _ = socket.recv_fds(sock, 1, 2, socket.MSG_CMSG_CLOEXEC)
        except TimeoutError:
            silent.add(pid)
        except OSError:  # there is no heir
            return None
    if len(files) != 2:
        for file in files:
            os.close(file)
        return None
    return socket.socket(fileno=files[0]), files[1]


def is_same_user(peer: socket.socket) -> bool:
    """Return whether the process at the other end is one of this user."""
    return _peer(peer)[1] == os.geteuid()


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Return pid and user of the process at the other end: the one that connected, or that called listen()."""
    # man 7 unix: struct ucred.
    pid, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user


def _step_down_name(key: bytes, pid: int) -> str | None:
    if sys.platform != "linux":
        return None
    try:
        began = read_stat(pid)[19]  # in clock ticks since boot
    except OSError:  # it is in another pid namespace, or /proc hides it
        return None
    return f"\0django_promports/step-down/{hmac.new(key, f'step-down {pid} {began}'.encode(), 'sha256').hexdigest()}"


def _hand_over_name(key: bytes, port: int) -> str:
    return f"\0django_promports/hand-over/{hmac.new(key, f'hand-over {port}'.encode(), 'sha256').hexdigest()}"


def _bind_sign(kind: socket.SocketKind, name: str) -> socket.socket | None:
    if sys.platform != "linux":
        return None
    sign = socket.socket(socket.AF_UNIX, kind)
    try:
        sign.setblocking(False)
        sign.bind(name)
        if kind == socket.SOCK_STREAM:
            sign.listen()
    except OSError:  # this process has already bound it
        sign.close()
        return None
    return sign


def format_waiting(count: int) -> str:
    """Return a clause on how many processes wait for a port."""
    if count == 1:
        return "1 process waits for a port and is not metered"
    return f"{count} processes wait for a port and are not metered"


def _waiting_name(ports: Sequence[int]) -> str:
    return f"django_promports/waiting/{ports[0]}-{ports[-1]}x{len(ports)}/"
