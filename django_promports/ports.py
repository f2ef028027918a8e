"""Ports: parsing the port range, checking the address, and claiming the lowest free port.

A process holds a port while its listening socket is bound to it. The kernel arbitrates, and frees
the port when the process ends, however it ends.
"""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

# Prometheus closes the connection of a scrape that timed out, and there are few other clients: a short queue is enough.
BACKLOG = 128
LISTEN_ATTEMPTS = 3
# linux/in.h; not in Python's socket module. bind() then checks the address, but takes no port until connect().
IP_BIND_ADDRESS_NO_PORT = 24


class RangeFull(Exception):
    """Every port of the range is taken."""

    def __init__(self, address: str, ports: Sequence[int]) -> None:
        count = len(ports)
        super().__init__(f"No free port in {format_ports(ports)} on {address}: {count} of {count} taken.")


class Claim(NamedTuple):
    """A claimed port, held for as long as its socket is open."""

    port: int
    listener: socket.socket


def parse_ports(value: object) -> tuple[int, ...]:
    """Return the ports of a `range`, a sequence of ports or "19100-19131" (both ends included), lowest first.

    Raises ValueError, with what is wrong.
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
        raise ValueError('it is not a range; write range(19100, 19132) or "19100-19131"')
    if not ports:
        reversed_range = isinstance(ports, range) and ports.start > ports.stop
        raise ValueError("it is reversed" if reversed_range else "it is empty")
    for port in (ports[0], ports[-1]) if isinstance(ports, range) else ports:
        if not isinstance(port, int) or isinstance(port, bool):
            raise ValueError(f"{port!r} is not a port number")
        if not 1 <= port <= 65535:
            raise ValueError(f"{port} is outside 1..65535")
    numbers = sorted(port for port in ports if isinstance(port, int))
    if len(set(numbers)) < len(numbers):
        raise ValueError("it names a port twice")
    return tuple(numbers)


def format_ports(ports: Sequence[int]) -> str:
    """Return the ports as text: "19100-19131" if they are contiguous, else with commas."""
    if len(ports) > 1 and ports[-1] - ports[0] == len(ports) - 1:
        return f"{ports[0]}-{ports[-1]}"
    return ",".join(map(str, ports))


def resolve(address: str, port: int = 0) -> tuple[socket.AddressFamily, tuple[Any, ...]]:
    """Return family and socket address of an IP address literal, without a DNS query.

    Raises ValueError if it is not an IP address.
    """
    try:
        ipaddress.ip_address(address)
        info = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (ValueError, OSError):
        raise ValueError(f"{address!r} is not an IP address") from None
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

    Raises RangeFull if there is none, ValueError if the address is not an IP address, and OSError for
    every error that another port would not avoid (an address of another machine, a privileged port).
    """
    for port in ports:
        listener = listen(address, port)
        if listener is not None:
            return Claim(port, listener)
    raise RangeFull(address, ports)


def listen(address: str, port: int) -> socket.socket | None:
    """Return a listening socket; None if the port is taken. Raises what claim() raises for other reasons."""
    family, target = resolve(address, port)
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
            # Linux lets two SO_REUSEADDR sockets bind one port while neither listens; listen() may then fail for both.
    return None
