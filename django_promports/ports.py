"""Ports: which ones may be claimed, claiming the lowest free one, and who waits for one.

A process holds a port while its listening socket is bound to it. The kernel arbitrates, and frees
the port when the process ends, however it ends.
"""

from __future__ import annotations

import errno
import hmac
import ipaddress
import os
import re
import socket
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

# Prometheus closes its connection after a scrape that it gave up, and others ask too: a short queue is enough.
BACKLOG = 128
LISTEN_ATTEMPTS = 3
# linux/in.h; not in Python's socket module. Binding checks the address but takes no port until connect().
IP_BIND_ADDRESS_NO_PORT = 24


class RangeFull(Exception):
    """Every port of the range is taken."""


class Claim(NamedTuple):
    """A claimed port: it is held for as long as the socket is open."""

    port: int
    listener: socket.socket


def parse_ports(value: object) -> tuple[int, ...]:
    """Return the ports of a `range`, a sequence of ports or "19100-19131" (both ends included), lowest first.

    Raises ValueError with a sentence on what is wrong.
    """
    ports: Sequence[object]
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", value, re.ASCII)
        if not match:
            raise ValueError('it does not parse; write it like "19100-19131"')
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise ValueError(f"it is reversed; write {last}-{first}")
        ports = range(first, last + 1)
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        ports = value
    else:
        raise ValueError('it is no range; write range(19100, 19132) or "19100-19131"')
    if not ports:
        reversed_range = isinstance(ports, range) and ports.start > ports.stop
        raise ValueError("it is reversed" if reversed_range else "it holds no port")
    for port in (ports[0], ports[-1]) if isinstance(ports, range) else ports:
        if not isinstance(port, int) or isinstance(port, bool):
            raise ValueError(f"{port!r} is no port number")
        if not 1 <= port <= 65535:
            raise ValueError(f"{port} is outside 1..65535")
    numbers = sorted(port for port in ports if isinstance(port, int))
    if len(set(numbers)) < len(numbers):
        raise ValueError("it names a port twice")
    return tuple(numbers)


def format_ports(ports: Sequence[int]) -> str:
    """Return the ports as a person writes them: 19100-19131 where they are contiguous."""
    if len(ports) > 1 and ports[-1] - ports[0] == len(ports) - 1:
        return f"{ports[0]}-{ports[-1]}"
    return ",".join(map(str, ports))


def resolve(address: str, port: int = 0) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Return family and socket address of an IP address literal, without asking a name server.

    Raises ValueError if it is none.
    """
    try:
        ipaddress.ip_address(address)
        info = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (ValueError, OSError):
        raise ValueError(f"{address!r} is no IP address") from None
    return info[0][0], info[0][4]


def check_address(address: str) -> None:
    """Raise ValueError or OSError if this machine cannot bind the address. No port is taken."""
    family, target = resolve(address)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if sys.platform == "linux":
            probe.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        probe.bind(target)


def claim(address: str, ports: Sequence[int]) -> Claim:
    """Bind and listen on the lowest free port.

    Raises RangeFull if there is none, ValueError if the address is no IP address, and OSError for
    everything that another port would not cure (an address that is not this machine's, a privileged port).
    """
    for port in ports:
        listener = _listen(*resolve(address, port))
        if listener is not None:
            return Claim(port, listener)
    raise RangeFull(f"No free port in {format_ports(ports)} on {address}: {len(ports)} of {len(ports)} taken.")


def _listen(family: socket.AddressFamily, target: tuple[Any, ...]) -> socket.socket | None:
    """Return a socket that listens; None if the port is taken."""
    for _ in range(LISTEN_ATTEMPTS):
        listener = socket.socket(family, socket.SOCK_STREAM)
        bound = False
        try:
            # A restart must not wait for TIME_WAIT. SO_REUSEPORT stays off: two processes must never share a port.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                # "::" means every interface, IPv4 included, whatever net.ipv6.bindv6only says.
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.setblocking(False)
            listener.bind(target)
            bound = True
            listener.listen(BACKLOG)
            return listener
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
            if not bound:
                return None
            # Linux lets two SO_REUSEADDR sockets bind one port while neither listens, and then may refuse both.
    return None


def announce_waiting(ports: Sequence[int]) -> socket.socket | None:
    """Make this process count as waiting for one of the ports until the returned socket is closed.

    The sign is an abstract unix socket: like a port it belongs to the network namespace and ends with the
    process, and needs no folder. Only Linux has them; elsewhere the answer is None.
    """
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
    """Listen for a child of this process that relieves it of its port: relieve_parent(). Linux only.

    The name is known to who has the key of the site, so that no other user has it first.
    """
    name = _step_down_name(key, os.getpid())
    return _bind_sign(socket.SOCK_STREAM, name) if name else None


def is_child(peer: socket.socket) -> bool:
    """Return whether who connected to the step-down socket is a child of this process."""
    try:
        # The parent's pid is the second field behind the name.
        return int(_read_stat(_peer(peer)[0])[1]) == os.getpid()
    except OSError:  # it has ended
        return False


def relieve_parent(key: bytes, seconds: float) -> None:
    """Wait until the parent has freed its port, if it has one and a step-down socket, and served no request."""
    parent = os.getppid()
    name = _step_down_name(key, parent)
    if not name:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.setblocking(False)  # nobody may keep this process waiting but its parent
            sock.connect(name)
            pid, user = _peer(sock)
            if pid == parent and user in (0, os.geteuid()):
                sock.settimeout(seconds)
                sock.recv(1)  # it says nothing, and hangs up when it is done
        except OSError:
            pass


def _peer(sock: socket.socket) -> tuple[int, int]:
    """Return process and user at the other end: who connected, or who began to listen."""
    # man 7 unix: struct ucred.
    pid, user, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, user


def _read_stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat behind the name, which may have parentheses in it (man 5 proc)."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _step_down_name(key: bytes, pid: int) -> str | None:
    if sys.platform != "linux":
        return None
    try:
        began = _read_stat(pid)[19]  # in clock ticks after the boot
    except OSError:  # of another pid namespace, or hidden
        return None
    return f"\0django_promports/step-down/{hmac.new(key, f'step-down {pid} {began}'.encode(), 'sha256').hexdigest()}"


def _bind_sign(kind: socket.SocketKind, name: str) -> socket.socket | None:
    if sys.platform != "linux":
        return None
    sign = socket.socket(socket.AF_UNIX, kind)
    try:
        sign.setblocking(False)
        sign.bind(name)
        if kind == socket.SOCK_STREAM:
            sign.listen()
    except OSError:  # this process has it already
        sign.close()
        return None
    return sign


def format_waiting(count: int) -> str:
    """Return how a person says how many processes wait."""
    if count == 1:
        return "1 process waits for a port and is not metered"
    return f"{count} processes wait for a port and are not metered"


def _waiting_name(ports: Sequence[int]) -> str:
    return f"django_promports/waiting/{ports[0]}-{ports[-1]}x{len(ports)}/"
